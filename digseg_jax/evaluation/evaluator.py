# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a segmenter on a split: examples in, masks from the segmenter, integer counts out.

Every process reads and counts the images that its own devices segment. The counts are small, so they
are gathered on all processes and written to one journal: a killed evaluation continues where it
stopped, and the result is the same integers on any number of devices.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import EvalConfig
from digseg_jax.config.templates import PLACE, fill
from digseg_jax.evaluation import fitting
from digseg_jax.evaluation.clip_presence import load_presence
from digseg_jax.evaluation.counts import (
    DEFAULT_THRESHOLD,
    Counted,
    count_foreground,
    count_image,
)
from digseg_jax.evaluation.examples import EvalExamples
from digseg_jax.evaluation.gallery import Shown
from digseg_jax.evaluation.journal import Journal
from digseg_jax.evaluation.scores import Scores
from digseg_jax.io.progress import Progress
from digseg_jax.log import log
from digseg_jax.metrics import presence as open_vocab
from digseg_jax.prediction.answer import Answer
from digseg_jax.prediction.request import Request
from digseg_jax.prediction.segmenter import Segmenter
from digseg_jax.runtime.collectives import gather_all
from digseg_jax.runtime.distributed import together
from digseg_jax.runtime.preemption import leave_if_asked
from digseg_jax.segmentation import calibration as calibration_lib
from digseg_jax.segmentation.calibration import Calibration

COARSE = EStep(1, 1)  # sampling of the pass that finds the classes present, one member and one step
THRESHOLD_IMAGES = 30  # training images for the threshold search of a foreground class


class Evaluator:
    """Evaluator of a segmenter on the examples of one split.

    Args:
      prompts: prompt i asks for class i, without a template; by default the names of the classes are
        asked, in the templates of `settings`, the weights or the data set (see `Segmenter.asks_in`).
      seed: seed of the ensemble members' noise.

    Raises:
      ValueError: the number of prompts differs from the number of classes.
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
        self.segmenter, self.settings, self.codec = segmenter, settings, segmenter.task.codec

        # A palette has a color for every class, one for what is none of the others among them.
        if self.codec.closed:
            examples = dataclasses.replace(examples, rest=-1)
        self.examples = examples
        self.seed, self.queries = seed, tuple(prompts or examples.classes)
        if len(self.queries) != len(examples.classes):
            raise ValueError(f"{len(self.queries)} queries for {len(examples.classes)} classes")

        # Prompts are complete texts; only class names are put into templates.
        wanted = settings.templates
        self.templates = () if prompts else segmenter.asks_in(examples.template, wanted)

        # "auto" takes the data set's own convention from its `DatasetSpec`.
        self.mode = examples.inference if settings.inference == "auto" else settings.inference
        self.absent = examples.absent if settings.absent_rule == "auto" else settings.absent_rule
        self._gate_seconds = 0.0  # in the passes of a CLIP, which the segmenter's clock does not see

    @property
    def prompts(self) -> tuple[str, ...]:
        """The texts that the text encoder reads for the whole vocabulary, class by class."""
        templates = self.templates or (PLACE,)
        return self.codec.texts([fill(t, query) for query in self.queries for t in templates])

    def asked(self) -> dict[str, Any]:
        """The network's input for results.json: templates of the prompts, size and scale of views."""
        windows = self.mode == "window"
        return {
            "templates": list(self.templates),
            "inference": self.mode,
            "view_size": list(self.segmenter.size),
            "short_side": self.segmenter.short_side if windows else 0,
        }

    @property
    def protocol(self) -> str:
        """Name of the headline's protocol.

        "exhaustive" asks for every class, "gated" only for those that a CLIP or a coarse pass finds.
        """
        limit = self.settings.exhaustive_limit
        return "exhaustive" if self.codec.asks_for_all(len(self.examples.asked), limit) else "gated"

    @property
    def protocols(self) -> tuple[str, ...]:
        """All protocols to score: the headline's, then "gated" and "oracle".

        The oracle asks only for the classes that the label contains: an upper bound that assumes the
        classes are known. A closed codec always answers all of its classes, so it has one protocol.
        """
        if self.codec.closed:
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
        """Counts all images under one protocol and returns their scores.

        Args:
          estep: ensemble size and number of denoising steps.
          calibration: scale and class biases of the mask scores; None leaves the scores as they are.
          protocol: one of `open_vocab.PROTOCOLS`; the headline's by default.
          journal: counts of an earlier, killed run; receives the counts of every image.
          shown: the gallery's choice of images; is offered every image.
        """
        # Defaults: a journal in memory, and a gallery of no images.
        protocol = protocol or self.protocol
        journal = journal or Journal(None, "counts", "")
        shown = shown or Shown(0, len(self.examples), None)

        def count(images: Sequence[int], found: Sequence[dict]) -> list[Counted]:
            """Asks for the protocol's classes and counts the answers, one per image."""
            answers = self._ask(protocol, images, found, estep, calibration)
            counted = []
            for example, (answer, asked, facts) in zip(found, answers, strict=True):
                one = count_image(
                    self.examples, example["label"], answer, asked, keep_masks=shown.wanted
                )
                counted.append(dataclasses.replace(one, row=one.row | facts))
            return counted

        # For readers of the journal file: the texts that its rows belong to.
        if "prompts" not in journal:
            journal.add("prompts", list(self.prompts))

        # Images counted before a kill are offered first, with their score only: the choice of the
        # worst and best must not depend on where a run was interrupted.
        name = f"{estep} {protocol}"
        for image in range(len(self.examples)):
            if f"{name} {image}" in journal:
                shown.offer(image, self._of_an_image(journal[f"{name} {image}"]), None)

        # Count the rest; the masks are known only on the process that segmented the image.
        for counted in self._counted(self.examples, name, journal, count):
            for image, row, own in counted:
                shown.offer(image, self._of_an_image(row), own)

        # Read all rows back from the journal, so that counts of this run and an earlier one are alike.
        rows = tuple(journal[f"{name} {i}"] for i in range(len(self.examples)))
        return Scores(self.examples, protocol, rows, self.absent)

    def coverage(self, names: Sequence[str], estep: EStep, journal: Journal) -> dict[str, float]:
        """Share (0..1) of all images' pixels that the mask of each name covers, judged by itself."""

        def count(images: Sequence[int], found: Sequence[dict[str, Any]]) -> list[Counted]:
            """Counts the pixels of each mask, and those of the image."""
            answers = self._segment(images, found, [tuple(names)] * len(images), estep)
            rows = [
                {
                    "covered": [
                        int((answer.alone(q) > DEFAULT_THRESHOLD).sum()) for q in range(len(names))
                    ],
                    "pixels": int(example["label"].size),
                }
                for example, answer in zip(found, answers, strict=True)
            ]
            return [Counted(row, np.zeros((1, 1)), {}) for row in rows]

        # The generator writes the journal; its items are of no further use.
        name = f"{estep} wrong names"
        for _ in self._counted(self.examples, name, journal, count):
            pass
        rows = [journal[f"{name} {i}"] for i in range(len(self.examples))]
        covered = np.sum([row["covered"] for row in rows], axis=0) / sum(row["pixels"] for row in rows)
        return dict(zip(names, covered.tolist(), strict=True))

    def threshold_counts(
        self,
        estep: EStep,
        training: EvalExamples,
        journal: Journal | None = None,
        scale: float | None = None,
    ) -> list[dict[str, Any]]:
        """Counts of the first training images, for searching the threshold of a foreground class.

        scale: of the mask scores of the images that the threshold is for; None: the segmenter's own.

        Returns:
          One row per image, at most THRESHOLD_IMAGES; each names its split.
        """
        training = training.first(THRESHOLD_IMAGES)
        journal = journal or Journal(None, "counts", "")

        def count(images: Sequence[int], found: Sequence[dict]) -> list[Counted]:
            """Counts pixels above each threshold, for the last class only."""
            # Where classes compete, it has the same rivals as in the scored images.
            asked = self.queries if self.codec.exclusive else self.queries[-1:]
            answers = self._segment(images, found, [asked] * len(images), estep, scale=scale)

            # Only the metric's own counts are needed: no prediction and no masks are kept.
            rows = [
                count_foreground(training, example["label"], answer)
                for example, answer in zip(found, answers, strict=True)
            ]
            return [Counted(row | {"split": training.split}, np.zeros((1, 1)), {}) for row in rows]

        # The generator writes the journal; its items are of no further use.
        name = f"{estep} threshold"
        for _ in self._counted(training, name, journal, count):
            pass
        return [journal[f"{name} {i}"] for i in range(len(training))]

    @property
    def fits(self) -> bool:
        """Whether biases can be fitted: see `fitting.same_competition`."""
        limit = self.settings.exhaustive_limit
        return fitting.same_competition(self.examples, self.codec, limit)

    def fitted_to(self, estep: EStep, examples: EvalExamples) -> tuple[EvalExamples, int]:
        """The images that a calibration is fitted to, and the most pixels of each."""
        # The mean of latents is decoded once; otherwise each member has a score, for each of its texts.
        once = self.settings.decoder == "latent_mean" and not self.codec.recolored
        texts = 1 if self.codec.pooled else max(1, len(self.templates))
        members = texts * (1 if once else estep.ensemble)
        return fitting.choose(examples, len(self.queries), members)

    def calibrate(self, estep: EStep, examples: EvalExamples) -> Calibration:
        """Fits scale and class biases for one E-Step, with all its members, on a split not scored.

        The pixels of a large split are too many: see `fitted_to`.

        Raises:
          ValueError: `examples` are of the split that is scored.
        """
        if examples.split == self.examples.split:
            raise ValueError(f"a calibration on {examples.split!r}, the split that is scored")

        if not self.fits:
            log.info("no calibration of %s: not all classes are asked for in one mask image", estep)
            return calibration_lib.identity(len(self.queries), self.segmenter.scale)

        # Each process collects mask scores of its own images.
        examples, most = self.fitted_to(estep, examples)
        every = range(len(examples))
        pixels: dict[str, str] = {}  # image index -> encoded arrays, as JSON has only text keys
        for _, images, found in self._groups(examples, every, f"calibration {estep}"):
            queries = [self.queries] * len(images)
            answers = self._segment(images, found, queries, estep, evidence=True)
            for i, example, answer in zip(images, found, answers, strict=True):
                pixels[str(i)] = fitting.encoded(fitting.few_pixels(example["label"], answer, most))

        # Every process fits the same numbers to all processes' pixels, in the order of the images.
        merged = {i: text for part in gather_all(pixels) for i, text in part.items()}
        evidence, label = fitting.joined([merged[str(i)] for i in every])
        return calibration_lib.fit(
            evidence,
            label,
            examples.split,
            self.codec.scale,
            exclusive=self.codec.exclusive,
            background=self.codec.background,
            covers=self.examples.covers,
        )

    def _ask(
        self,
        protocol: str,
        images: Sequence[int],
        found: Sequence[dict[str, Any]],
        estep: EStep,
        calibration: Calibration | None,
    ) -> list[tuple[Answer, Sequence[int], dict[str, Any]]]:
        """Asks for the classes of a protocol in each image.

        Returns:
          For each image: the answer, the classes its queries stand for, and more entries for its row.

        Raises:
          ValueError: unknown protocol.
        """
        every = list(self.examples.asked)
        facts: list[dict[str, Any]] = [{} for _ in images]
        if protocol == "exhaustive":
            # slots=0: the segmenter fits them to the number of queries, which is always the same
            asked, slots = [every] * len(images), 0
        elif protocol == "gated":
            # A first pass judges presence; only the classes that survive are queried. The presence
            # goes into the row, for the recall of gates of other sizes.
            presence = self._presence(images, found)
            most = self.codec.gate_limit(self.settings.gate_limit)
            cut = 0.0 if self.settings.presence_model else self.settings.gate_cut
            asked = [open_vocab.survivors(self._askable(p), most, cut).tolist() for p in presence]
            facts = [{"presence": [float(x) for x in p]} for p in presence]
            slots = self.codec.slots(most)
        elif protocol == "oracle":
            # An image without a single label still needs a query: ask for class 0.
            shown = [np.unique(f["label"][f["label"] >= 0]).tolist() for f in found]
            present = [[c for c in classes if c in every] for classes in shown]
            asked = [classes or every[:1] for classes in present]
            slots = self.codec.slots(self.settings.gate_limit)
        else:
            raise ValueError(f"protocol {protocol!r}; legal: {', '.join(open_vocab.PROTOCOLS)}")

        # A bias belongs to a class, so each image gets the biases of the classes it is asked for. If
        # all biases are zero, None saves computing the masks without bias a second time.
        queries = [tuple(self.queries[c] for c in classes) for classes in asked]
        biases = None
        if calibration is not None and any(calibration.bias):
            biases = [tuple(calibration.bias[c] for c in classes) for classes in asked]
        scale = None if calibration is None else calibration.scale
        answers = self._segment(images, found, queries, estep, biases=biases, scale=scale, slots=slots)
        return list(zip(answers, asked, facts, strict=True))

    def _askable(self, presence: np.ndarray) -> np.ndarray:
        """Presence scores [classes] in which a class that is never asked for comes last."""
        asked = np.isin(np.arange(len(presence)), self.examples.asked)
        return np.where(asked, presence, -np.inf)

    def _presence(self, images: Sequence[int], found: Sequence[dict[str, Any]]) -> list[np.ndarray]:
        """Presence scores [classes] of each image, from a CLIP or from one coarse step.

        In the coarse step the whole image is squeezed into one view, and masks are read with the
        linear latent decoder.
        """
        if spec := self.settings.presence_model:
            clip = load_presence(spec)
            before = clip.seconds
            scores = [clip.scores(example["image"], self.queries) for example in found]
            self._gate_seconds += clip.seconds - before
            return scores

        queries = [self.queries] * len(images)
        answers = self._segment(images, found, queries, COARSE, mode="whole", decoder="probe")
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
        """Segments images, each with its own queries.

        Args:
          images: indices in the split; they seed the members' noise.
          biases: class biases per image, in the order of its queries; None for no biases.
          mode: "window" or "whole"; the evaluator's own by default.
          options: further options of `Segmenter.segment`.
        """
        own: Sequence[tuple[float, ...] | None] = biases or [None] * len(images)
        requests = [
            Request(example["image"], i, asked, bias, self.templates)
            for i, example, asked, bias in zip(images, found, queries, own, strict=True)
        ]
        return self.segmenter.segment(requests, estep, key=self.seed, mode=mode or self.mode, **options)

    def _of_an_image(self, row: dict[str, Any]) -> float:
        """Score (0..1) of a single image's row, for a gallery."""
        return Scores(self.examples, self.protocol, (row,), self.absent).of_an_image

    def _counted(
        self,
        examples: EvalExamples,
        name: str,
        journal: Journal,
        count: Callable[[Sequence[int], Sequence[dict[str, Any]]], list[Counted]],
    ) -> Iterator[list[tuple[int, dict[str, Any], Counted | None]]]:
        """Counts the images that the journal lacks, and adds them to it.

        Yields:
          For each group of images: index, row, and the counts with masks on the process that has them
          (None elsewhere).
        """
        pending = [i for i in range(len(examples)) if f"{name} {i}" not in journal]
        for group, images, found in self._groups(examples, pending, f"eval {name}"):
            # The clocks exclude compilation; every image gets the mean of its group.
            before = self.segmenter.seconds + self._gate_seconds
            counted = dict(zip(images, count(images, found), strict=True))
            seconds = (self.segmenter.seconds + self._gate_seconds - before) / len(group)

            # Every process gets all rows; `gather_all` sends JSON, whose keys are texts.
            own = {str(i): c.row for i, c in counted.items()}
            rows = {int(i): row for part in gather_all(own) for i, row in part.items()}

            # Yield before the journal is written: the caller keeps masks for the gallery, and a kill in
            # between must not lose them, as images in the journal are not computed again.
            yield [(i, rows[i], counted.get(i)) for i in group]
            for i in group:
                journal.add(f"{name} {i}", rows[i] | {"seconds": seconds})

    def _groups(
        self, examples: EvalExamples, pending: Sequence[int], label: str
    ) -> Iterator[tuple[Sequence[int], Sequence[int], list[dict[str, Any]]]]:
        """Groups of images that are segmented together, one batch of views over all processes.

        Yields:
          Indices of the group, indices of this process's share, and the examples of that share.
        """
        part, parts = self.segmenter.programs.part, self.segmenter.programs.parts
        size = self.segmenter.views_of_call
        progress = Progress(len(pending), label=label, unit="images")

        # Each process takes the images of its devices, in the order of the devices, so that an image's
        # row in the call is the same on any mesh. `together` raises a read error on all processes.
        share = size // parts
        started = time.monotonic()
        for start in range(0, len(pending), size):
            leave_if_asked()
            group = pending[start : start + size]
            mine = group[part * share : (part + 1) * share]
            with together(f"the images of {label}"):
                found = [examples[i] for i in mine]
            yield group, mine, found
            done = start + len(group)
            progress.update(done, done / max(time.monotonic() - started, 1e-9))
        progress.close()
