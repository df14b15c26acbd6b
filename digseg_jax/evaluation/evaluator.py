# SPDX-License-Identifier: Apache-2.0
"""Examples in, masks from the segmenter, integer counts out; the same integers on any devices.

Every process reads and counts the images that its devices segment; the counts, which are small, are
gathered and written to one journal, so that a killed evaluation goes on where it was.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import EvalConfig
from digseg_jax.evaluation.counts import Counted, count_foreground, count_image
from digseg_jax.evaluation.examples import EvalExamples
from digseg_jax.evaluation.gallery import Shown
from digseg_jax.evaluation.journal import Journal, unpack
from digseg_jax.evaluation.scores import Scores
from digseg_jax.io.progress import Progress
from digseg_jax.metrics import confusion
from digseg_jax.metrics import presence as open_vocab
from digseg_jax.prediction.answer import Answer
from digseg_jax.prediction.segmenter import Request, Segmenter, query_slots
from digseg_jax.runtime.collectives import gather_all
from digseg_jax.runtime.distributed import together
from digseg_jax.segmentation import calibration as calibration_lib
from digseg_jax.segmentation.calibration import Calibration

CALIBRATION_STRIDE = 4  # every 4th pixel of both axes is enough to fit some numbers
COARSE = EStep(1, 1)  # the pass that judges which classes of a large vocabulary are there
THRESHOLD_IMAGES = 30  # of the training split, for the threshold of a foreground class


class Evaluator:
    """Evaluates a segmenter on the examples of a split.

    prompts: query i stands for class i; by default the data set's own. seed: of the members' noise.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        examples: EvalExamples,
        settings: EvalConfig,
        *,
        seed: int,
        prompts: Sequence[str] = (),
    ):
        self.segmenter, self.examples, self.settings = segmenter, examples, settings
        self.seed, self.prompts = seed, tuple(prompts or examples.prompts)
        if len(self.prompts) != len(examples.classes):
            raise ValueError(f"{len(self.prompts)} queries for {len(examples.classes)} classes")
        self.mode = examples.inference if settings.inference == "auto" else settings.inference
        self.absent = examples.absent if settings.absent_rule == "auto" else settings.absent_rule
        self.palette = segmenter.task.codec == "palette"

    @property
    def protocol(self) -> str:
        """How classes are asked for: all of them, or those that a coarse pass lets through."""
        all_of_them = self.palette or len(self.prompts) <= self.settings.exhaustive_limit
        return "exhaustive" if all_of_them else "gated"

    @property
    def protocols(self) -> tuple[str, ...]:
        """The headline's, and what tells how far it is from knowing the classes."""
        if self.palette:
            return ("exhaustive",)
        return tuple(dict.fromkeys((self.protocol, "gated", "oracle")))

    def scores(
        self,
        estep: EStep,
        calibration: Calibration | None = None,
        *,
        protocol: str = "",
        journal: Journal | None = None,
        shown: Shown | None = None,
    ) -> Scores:
        """The counts of all images under a protocol, by default the headline's.

        journal: what a killed evaluation had counted; gets every image. shown: is offered every image.
        """
        protocol = protocol or self.protocol
        journal = journal or Journal(None, "counts", "")
        shown = shown or Shown(0, len(self.examples), None)

        def count(images: Sequence[int], found: Sequence[dict]) -> list[Counted]:
            answers = self._ask(protocol, images, found, estep, calibration)
            counted = []
            for example, (answer, asked, facts) in zip(found, answers, strict=True):
                one = count_image(
                    self.examples, example["label"], answer, asked, keep_masks=shown.wanted
                )
                counted.append(dataclasses.replace(one, row=one.row | facts))
            return counted

        name = f"{estep} {protocol}"
        for image in range(len(self.examples)):
            if f"{name} {image}" in journal:
                shown.offer(image, _image_miou(journal[f"{name} {image}"]), None)
        for counted in self._counted(self.examples, name, journal, count):
            for image, row, own in counted:
                shown.offer(image, _image_miou(row), own)
        rows = tuple(journal[f"{name} {i}"] for i in range(len(self.examples)))
        return Scores(self.examples, protocol, rows, self.absent)

    def threshold_counts(
        self, estep: EStep, training: EvalExamples, journal: Journal | None = None
    ) -> list[dict[str, Any]]:
        """Counts of some training images, on which a foreground class's threshold is searched."""
        training = training.first(THRESHOLD_IMAGES)
        journal = journal or Journal(None, "counts", "")

        def count(images: Sequence[int], found: Sequence[dict]) -> list[Counted]:
            # A palette always answers all of its classes.
            asked = self.prompts if self.palette else self.prompts[-1:]
            answers = self._segment(images, found, [asked] * len(images), estep)
            rows = [
                count_foreground(training, example["label"], answer)
                for example, answer in zip(found, answers, strict=True)
            ]
            return [Counted(row | {"split": training.split}, np.zeros((1, 1)), {}) for row in rows]

        name = f"{estep} threshold"
        for _ in self._counted(training, name, journal, count):
            pass
        return [journal[f"{name} {i}"] for i in range(len(training))]

    def calibrate(self, estep: EStep, examples: EvalExamples) -> Calibration:
        """Scale and biases of an E-Step, fitted with its members on a split that is not scored."""
        if examples.split == self.examples.split:
            raise ValueError(f"a calibration on {examples.split!r}, the split that is scored")
        every = range(len(examples))
        pixels: dict[str, str] = {}
        for _, images, found in self._groups(examples, every, f"calibration {estep}"):
            prompts = [self.prompts] * len(images)
            answers = self._segment(images, found, prompts, estep, evidence=True)
            for i, example, answer in zip(images, found, answers, strict=True):
                pixels[str(i)] = _encoded(_few_pixels(example["label"], answer))

        # Every process fits the same numbers to the pixels of all of them, in the images' order.
        merged = {i: text for part in gather_all(pixels) for i, text in part.items()}
        tables = [_decoded(merged[str(i)]) for i in every]
        evidence = np.concatenate([evidence for evidence, _ in tables])
        label = np.concatenate([label for _, label in tables])
        return calibration_lib.fit(evidence, label, examples.split, self.fixed_scale)

    @property
    def fixed_scale(self) -> float | None:
        """Of a palette's evidence; None where the scale is to be fitted (binary codec)."""
        return self.segmenter.scale if self.palette else None

    def _ask(
        self,
        protocol: str,
        images: Sequence[int],
        found: Sequence[dict[str, Any]],
        estep: EStep,
        calibration: Calibration | None,
    ) -> list[tuple[Answer, Sequence[int], dict[str, Any]]]:
        """The answer about each image, the classes that its queries stand for, and more to note."""
        every = list(range(len(self.prompts)))
        facts: list[dict[str, Any]] = [{} for _ in images]
        if protocol == "exhaustive":
            asked, slots = [every] * len(images), 0
        elif protocol == "gated":
            presence = self._presence(images, found)
            limits = self.settings.gate_limit, self.settings.gate_cut
            asked = [open_vocab.survivors(p, *limits).tolist() for p in presence]
            facts = [{"presence": [float(x) for x in p]} for p in presence]
            slots = query_slots(self.settings.gate_limit)
        elif protocol == "oracle":
            present = [np.unique(f["label"][f["label"] >= 0]).tolist() for f in found]
            asked = [classes or every[:1] for classes in present]
            slots = query_slots(self.settings.gate_limit)
        else:
            raise ValueError(f"protocol {protocol!r}; legal: {', '.join(open_vocab.PROTOCOLS)}")

        queries = [tuple(self.prompts[c] for c in classes) for classes in asked]
        biases = None
        if calibration is not None:
            biases = [tuple(calibration.bias[c] for c in classes) for classes in asked]
        scale = None if calibration is None else calibration.scale
        answers = self._segment(images, found, queries, estep, biases=biases, scale=scale, slots=slots)
        return list(zip(answers, asked, facts, strict=True))

    def _presence(self, images: Sequence[int], found: Sequence[dict[str, Any]]) -> list[np.ndarray]:
        """How sure one coarse step is that each class is there, of images squeezed into one view."""
        prompts = [self.prompts] * len(images)
        answers = self._segment(images, found, prompts, COARSE, mode="whole", decoder="probe")
        return [open_vocab.presence(answer.cell_probabilities()) for answer in answers]

    def _segment(
        self,
        images: Sequence[int],
        found: Sequence[dict[str, Any]],
        queries: Sequence[tuple[str, ...]],
        estep: EStep,
        *,
        biases: Sequence[tuple[float, ...]] | None = None,
        mode: str = "",
        **options: Any,
    ) -> list[Answer]:
        biases = biases or [None] * len(images)
        requests = [
            Request(example["image"], i, asked, bias)
            for i, example, asked, bias in zip(images, found, queries, biases, strict=True)
        ]
        return self.segmenter.segment(requests, estep, key=self.seed, mode=mode or self.mode, **options)

    def _counted(
        self,
        examples: EvalExamples,
        name: str,
        journal: Journal,
        count: Callable[[Sequence[int], Sequence[dict[str, Any]]], list[Counted]],
    ) -> Iterator[list[tuple[int, dict[str, Any], Counted | None]]]:
        """Counts what the journal lacks: image, row and, where this process has them, its masks."""
        pending = [i for i in range(len(examples)) if f"{name} {i}" not in journal]
        for group, images, found in self._groups(examples, pending, f"eval {name}"):
            before = self.segmenter.seconds
            counted = dict(zip(images, count(images, found), strict=True))
            seconds = (self.segmenter.seconds - before) / len(group)

            # JSON has no integers as keys.
            own = {str(i): c.row for i, c in counted.items()}
            rows = {int(i): row for part in gather_all(own) for i, row in part.items()}

            # Masks that are shown are kept first: what the journal has is not computed again.
            yield [(i, rows[i], counted.get(i)) for i in group]
            for i in group:
                journal.add(f"{name} {i}", rows[i] | {"seconds": seconds})

    def _groups(
        self, examples: EvalExamples, pending: Sequence[int], label: str
    ) -> Iterator[tuple[Sequence[int], Sequence[int], list[dict[str, Any]]]]:
        """Images that are segmented together: those of all processes, this one's, and its examples."""
        part, parts = self.segmenter.programs.part, self.segmenter.programs.parts
        size = self.segmenter.view_buckets[-1]
        progress = Progress(len(pending), label=label, unit="images")
        started = time.monotonic()
        for start in range(0, len(pending), size):
            group = pending[start : start + size]
            mine = group[part::parts]
            with together(f"the images of {label}"):
                found = [examples[i] for i in mine]
            yield group, mine, found
            done = start + len(group)
            progress.update(done, done / max(time.monotonic() - started, 1e-9))
        progress.close()


def _image_miou(row: dict[str, Any]) -> float:
    return confusion.mean_iou(unpack(row["confusion"]))


def _few_pixels(label: np.ndarray, answer: Answer) -> dict[str, np.ndarray]:
    """Evidence [pixels, q, e] and labels [pixels] at every 4th pixel, to fit a calibration to."""
    stride = slice(None, None, CALIBRATION_STRIDE)
    planes = [answer.evidence(q)[:, stride, stride] for q in range(answer.num_queries)]
    evidence = np.stack([p.reshape(len(p), -1) for p in planes])
    return {"evidence": np.moveaxis(evidence, -1, 0), "label": label[stride, stride].ravel()}


def _encoded(arrays: dict[str, np.ndarray]) -> str:
    """Arrays as text, exactly."""
    data = io.BytesIO()
    np.savez(data, **arrays)
    return base64.b64encode(data.getvalue()).decode("ascii")


def _decoded(text: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(io.BytesIO(base64.b64decode(text))) as stored:
        return stored["evidence"], stored["label"]
