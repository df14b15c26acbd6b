# SPDX-License-Identifier: Apache-2.0
"""Evaluation as one padded, masked, sharded program; integer counts, results.json, gallery."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from digseg_jax import config as config_lib
from digseg_jax.arraytypes import Array, Params
from digseg_jax.config import Config
from digseg_jax.data.evaluation import EvalExamples, eval_examples, padded_batches
from digseg_jax.distributed import is_main, together
from digseg_jax.eval_progress import Progress as Recorded
from digseg_jax.eval_progress import Shown
from digseg_jax.hosts import fetch, fetch_to_main, place_rows
from digseg_jax.journal import identity_of
from digseg_jax.log import heartbeat, log
from digseg_jax.report.gallery import GalleryItem, write_gallery
from digseg_jax.segmentation import calibration as calibration_lib
from digseg_jax.segmentation import inference, metrics
from digseg_jax.segmentation.calibration import Calibration
from digseg_jax.segmentation.inference import EStep
from digseg_jax.segmentation.text_bank import PromptBank
from digseg_jax.sharding import BATCH, on_mesh
from digseg_jax.storage import AnyPath, filled_locally, write_bytes, write_json
from digseg_jax.tables import results_markdown
from digseg_jax.tasks.components import bank_arrays, encode_bank, picture_step
from digseg_jax.tasks.segmentation import PALETTE_PROMPT, SegmentationTask
from digseg_jax.tpu import compiler_options
from digseg_jax.writers import Progress

COUNTED = {  # classes that the mean goes over, by the absent-class rule
    "mmseg": "classes that occur or are predicted",
    "detectron2": "classes that occur",
    "official": "all classes",
}
CALIBRATION_STRIDE = 4  # every 4th pixel of both axes is enough to fit nine numbers


@dataclasses.dataclass
class Scores:
    """Raw counts of an evaluation; everything printed is computed from these."""

    classes: tuple[str, ...]
    confusion: np.ndarray  # [c, c + 1]
    overlaps: np.ndarray  # [images, q, c]
    areas: np.ndarray  # [images, c]
    names: list[str]
    seconds: float  # of sampling and decoding, compilation excluded
    probability: dict[int, np.ndarray]  # image -> [q, h, w], for the gallery
    notes: dict[int, str]  # image -> why it is in the gallery

    @property
    def miou(self) -> float:
        return metrics.mean_iou(self.confusion)

    def queries_per_second(self) -> float:
        return self.overlaps.shape[0] * self.overlaps.shape[1] / max(self.seconds, 1e-9)


class Evaluator:
    """Evaluates parameters of one task on a mesh; compiled once per E-Step."""

    def __init__(self, config: Config, task: SegmentationTask, mesh: Mesh):
        self.config, self.task, self.mesh = config, task, mesh
        self.step = picture_step(task.vae, task.unet_config)
        self.devices = mesh.shape["data"] * mesh.shape["fsdp"]
        # the batch must split evenly over the devices; the padding is masked
        self.batch_size = math.ceil(config.eval.batch_size / self.devices) * self.devices
        self._programs: dict[Any, Any] = {}

    def bank(self, prompts: Sequence[str]) -> PromptBank:
        """The encoded queries; a palette asks for all classes with one text of its own."""
        if self.task.codec == "palette":
            prompts = (PALETTE_PROMPT,)
        return encode_bank(self.task.tower, prompts, self.config.model)

    def frozen(self, bank: PromptBank) -> Params:
        """What every program reads beside the parameters: the autoencoder and the encoded queries."""
        return {"vae": self.task.frozen["vae"], "bank": bank_arrays(bank)}

    def examples(self, split: str, num_images: int = 0) -> EvalExamples:
        """The split's examples; if set, `num_images` of them, by default the configuration's."""
        return eval_examples(self.config.data, split, num_images or self.config.eval.num_images)

    def evidence(
        self, params: Params, examples: EvalExamples, bank: PromptBank, estep: EStep
    ) -> tuple[np.ndarray, np.ndarray]:
        """Decoded evidence [pixels, q, e] and labels [pixels], subsampled."""
        step = self.jit(partial(self._evidence, estep=estep), shared=2)
        parts, labels = [], []
        for batch, names in self.batches(examples, "calibration"):
            evidence = fetch(step(params, self.frozen(bank), batch))[: len(names)]
            parts.append(by_pixel(evidence))
            labels.append(subsampled_labels(batch, len(names)))
        return np.concatenate(parts), np.concatenate(labels)

    def calibrate(self, params: Params, bank: PromptBank, estep: EStep, split: str = "") -> Calibration:
        """Scale and biases of an E-Step, fitted with its members on a split that is not scored.

        split: by default the configuration's.
        """
        split = split or self.config.eval.calibrate_split
        examples = self.examples(split, self.config.eval.calibrate_images)
        evidence, label = self.evidence(params, examples, bank, estep)
        return calibration_lib.fit(evidence, label, split, self.fixed_scale())

    def fixed_scale(self) -> float | None:
        """Of a palette's evidence; None where the scale is to be fitted (binary codec)."""
        return self.task.palette.scale if self.task.codec == "palette" else None

    def scores(
        self,
        params: Params,
        examples: EvalExamples,
        bank: PromptBank,
        estep: EStep,
        calibration: Calibration,
        *,
        keep: int = 0,
        recorded: Recorded | None = None,
    ) -> Scores:
        """Counts over all examples; query i of the bank stands for class i of the data set.

        keep: images whose soft masks are kept. recorded: what a killed evaluation had counted.
        """
        classes = examples.classes
        if self.task.codec == "binary" and len(bank.prompts) != len(classes):
            raise ValueError(f"{len(bank.prompts)} queries for {len(classes)} classes")
        fitted = {"scale": np.float32(calibration.scale), "bias": np.float32(calibration.bias)}
        recorded = recorded or Recorded(None, "")
        shown = Shown(keep, len(examples), recorded)
        confusion = np.zeros((len(classes), len(classes) + 1), np.int64)
        overlaps, areas, seconds, names = [], [], 0.0, []

        def compute(batch: Params, count: int) -> dict[str, Any]:
            arguments = (params, self.frozen(bank), fitted, batch)
            step = self._compiled(estep, len(classes), arguments)
            start = time.monotonic()
            out = jax.block_until_ready(step(*arguments))
            seconds = time.monotonic() - start
            return {n: fetch(v)[:count] for n, v in out.items()} | {"seconds": seconds}

        for batch, own in self.batches(examples, f"eval {estep}"):
            done, count = len(names), len(own)
            key = f"{estep} {done}+{count}"
            out, new = recorded.batch(key, partial(compute, batch, count))
            for i, counts in enumerate(out["confusion"]):
                masks = partial(out["probability"].__getitem__, i) if new else None
                shown.offer(done + i, metrics.mean_iou(counts), masks)
            if new:
                recorded.record(key, out)
            confusion += out["confusion"].sum(axis=0, dtype=np.int64)
            overlaps.append(out["overlap"])
            areas.append(out["area"])
            seconds += out["seconds"]
            names += own
        return Scores(
            classes,
            confusion,
            np.concatenate(overlaps),
            np.concatenate(areas),
            names,
            seconds,
            *shown.final(),
        )

    def counting(self, estep: EStep, num_classes: int) -> Any:
        """The jitted program of one batch: (params, frozen, fitted, batch) to its counts."""
        return self.jit(partial(self._counts, estep=estep, num_classes=num_classes), shared=3)

    def _compiled(self, estep: EStep, num_classes: int, arguments: tuple[Params, ...]) -> Any:
        """That program for arguments of these shapes, compiled once, however often it is asked for."""
        shapes = tuple(map(jnp.shape, jax.tree.leaves(arguments)))
        key = (estep, num_classes, jax.tree.structure(arguments), shapes)
        if key not in self._programs:
            self._programs[key] = self.counting(estep, num_classes).lower(*arguments).compile()
        return self._programs[key]

    def _evidence(self, params: Params, frozen: Params, batch: Params, estep: EStep) -> Array:
        return subsampled(self._ask(params, frozen, batch, estep), batch)

    def _counts(
        self,
        params: Params,
        frozen: Params,
        fitted: Params,
        batch: Params,
        estep: EStep,
        num_classes: int,
    ) -> dict[str, Array]:
        return self.counts(self._ask(params, frozen, batch, estep), fitted, batch, num_classes)

    def counts(
        self, evidence: Array, fitted: Params, batch: Params, num_classes: int
    ) -> dict[str, Array]:
        """Confusion, overlaps and areas of each image of a batch, from its evidence [n, q, e, h, w]."""
        combined = partial(
            inference.probabilities,
            evidence,
            fitted["scale"],
            codec=self.task.codec,
            rule=self.config.eval.ensemble_rule,
        )
        # a query on its own is judged at evidence 0; the biases only matter between queries
        alone = at_labels(combined(jnp.zeros(num_classes)), batch) > 0.5
        probability = at_labels(combined(fitted["bias"], exclusive=True), batch)
        label = jnp.where(batch["valid"][:, None, None], batch["label"], -1)
        true = label[:, None] == jnp.arange(num_classes)[None, :, None, None]
        return {
            # image by image: the gallery shows the worst and the best
            "confusion": jax.vmap(
                lambda true, found: metrics.confusion(true[None], found[None], num_classes)
            )(label, metrics.label_map(probability)),
            "overlap": metrics.overlap(label, alone, num_classes),
            "area": true.sum(axis=(2, 3)).astype(jnp.int32),
            "probability": probability,
        }

    def _ask(self, params: Params, frozen: Params, batch: Params, estep: EStep) -> Array:
        return self.task.evidence(
            params,
            frozen,
            batch["image"],
            batch["index"],
            estep,
            decoder=self.config.eval.decoder,
        )

    def jit(self, function: Any, shared: int) -> Any:
        """Compiles a function of `shared` whole arguments and one batch that is split."""
        replicated, batch = NamedSharding(self.mesh, P()), NamedSharding(self.mesh, BATCH)
        # None: the U-Net's parameters stay placed as training left them
        in_shardings = (None, *[replicated] * (shared - 1), batch)
        return jax.jit(
            on_mesh(self.mesh, function),
            in_shardings=in_shardings,
            compiler_options=compiler_options(self.mesh.devices.flat[0].platform),
        )

    def batches(self, examples: EvalExamples, label: str) -> Iterator[tuple[Params, list[str]]]:
        """Padded device batches, and the names of the real examples in them."""
        progress = Progress(len(examples), label=label, unit="images")
        started, done = time.monotonic(), 0
        # every process reads the whole batch: its common size depends on all of its images
        for batch, names in padded_batches(
            examples, self.batch_size, self.step, self.config.eval.short_side
        ):

            def read(i: int, batch: dict[str, np.ndarray] = batch) -> dict[str, np.ndarray]:
                return {name: values[i] for name, values in batch.items()}

            silent = contextlib.nullcontext() if done else heartbeat(f"{label}: compiling, first batch")
            with silent:
                yield place_rows(read, self.batch_size, self.mesh), names
            done += len(names)
            progress.update(done, done / (time.monotonic() - started))
        progress.close()


def at_labels(probability: Array, batch: Params) -> Array:
    """Values [n, q, h, w] at the pictures' size, brought to that of the labels where it is another."""
    if "image_size" not in batch:
        return probability
    shape = batch["label"].shape[1:]
    return inference.enlarge_padded(probability, batch["image_size"], batch["size"], shape)


def subsampled(evidence: Array, batch: Params) -> Array:
    """Evidence [n, q, e, h, w] at every 4th pixel of the labels: what a calibration is fitted to."""
    planes = evidence.reshape(len(evidence), -1, *evidence.shape[-2:])
    few = at_labels(planes, batch)[..., ::CALIBRATION_STRIDE, ::CALIBRATION_STRIDE]
    return few.reshape(*evidence.shape[:3], *few.shape[-2:])


def subsampled_labels(batch: Params, count: int) -> np.ndarray:
    """The labels of those pixels, [pixels], of the first `count` pictures."""
    stride = slice(None, None, CALIBRATION_STRIDE)
    return fetch(batch["label"])[:count, stride, stride].ravel()


def by_pixel(evidence: np.ndarray) -> np.ndarray:
    """[n, q, e, h, w] to [pixels, q, e]."""
    return np.moveaxis(evidence, (1, 2), (-2, -1)).reshape(-1, *evidence.shape[1:3])


def results_of(scores: Scores, config: Config, calibration: Calibration, estep: EStep) -> dict:
    """The content of results.json; floats unrounded, nan as null."""

    def plain(x: float) -> float | None:
        return None if math.isnan(x) else float(x)

    iou = metrics.iou_per_class(scores.confusion)
    pixels = scores.areas.sum(axis=1, keepdims=True)
    alone = metrics.query_scores(scores.overlaps, scores.areas, pixels)
    return {
        "dataset": config.data.name,
        "split": config.eval.split,
        "protocol": f"{config.data.name}: held-out images, counts pooled over the split, mean over "
        f"{COUNTED[config.eval.absent_rule]}, exhaustive queries",
        "num_images": len(scores.names),
        "absent_rule": config.eval.absent_rule,
        "codec": config.segmentation.codec,
        "ensemble_rule": config.eval.ensemble_rule,
        "decoder": config.eval.decoder,
        "short_side": config.eval.short_side,
        "miou": metrics.mean_iou(scores.confusion, config.eval.absent_rule),
        "mean_accuracy": plain(metrics.mean_accuracy(scores.confusion)),
        "fwiou": plain(metrics.frequency_weighted_iou(scores.confusion)),
        "per_class": {name: plain(v) for name, v in zip(scores.classes, iou, strict=True)},
        "accuracy": metrics.pixel_accuracy(scores.confusion),
        "label_set": config.data.label_set if config.data.name == "landcover" else "",
        "ensemble": estep.ensemble,
        "steps": estep.steps,
        "spacing": estep.spacing,
        "seed": config.seed,
        "calibration": calibration.to_dict(),
        "confusion": scores.confusion.tolist(),
        **{name: plain(value) for name, value in alone.items()},
    }


def evaluate(
    config: Config, task: SegmentationTask, params: Params, mesh: Mesh, workdir: AnyPath
) -> dict[str, Any]:
    """Evaluates, and writes DIR/eval/{results.json, results.md, speed.json, estep.json, gallery/}.

    Returns the results. A killed evaluation goes on where it was when the same one is started again,
    and ends with the same results.json; times, which never are the same, are in speed.json.
    """
    evaluator = Evaluator(config, task, mesh)
    examples = evaluator.examples(config.eval.split)
    classes = examples.classes
    bank = evaluator.bank(examples.prompts)
    estep = EStep(config.eval.ensemble, config.eval.steps, config.eval.spacing)
    folder = workdir / "eval"
    values = config_lib.to_dict(config)
    facts = (values["data"], values["eval"], config.seed, len(examples))
    recorded = Recorded(folder / "unfinished", identity_of(fetch_to_main(params), *facts))

    def scored(estep: EStep, keep: int = 0) -> tuple[Scores, Calibration]:
        """Each E-Step with scale and biases of its own: fitted once, they would favour that one."""
        fitted = calibration_lib.identity(len(classes), evaluator.fixed_scale() or 2.0)
        if config.eval.calibrate:

            def calibrate() -> dict[str, Any]:
                return evaluator.calibrate(params, bank, estep).to_dict()

            fitted = Calibration.from_dict(recorded.fitted(f"calibration {estep}", calibrate))
            log.info("calibration of %s on %s: %s", estep, fitted.split, fitted.to_dict())
        arguments = (params, examples, bank, estep, fitted)
        return evaluator.scores(*arguments, keep=keep, recorded=recorded), fitted

    scores, fitted = scored(estep, min(config.eval.gallery, len(examples)))
    results = results_of(scores, config, fitted, estep)
    rows = [estep_row(row, *scored(row)) for row in map(EStep.parse, config.eval.estep)]
    with together("the files of the evaluation"):
        if is_main():
            _write(folder, results, rows, scores, examples)
    recorded.finish()
    return results


def _write(
    folder: AnyPath,
    results: dict[str, Any],
    rows: list[dict[str, Any]],
    scores: Scores,
    examples: EvalExamples,
) -> None:
    write_json(folder / "results.json", results)
    write_bytes(folder / "results.md", results_markdown(results).encode())
    write_json(folder / "speed.json", {"queries_per_second": scores.queries_per_second()})
    with filled_locally(folder / "gallery", replace=True) as gallery:
        _write_gallery(gallery, scores, examples)
    if rows:
        note = "Measured by this run on its own split; a small model, trained for minutes."
        write_json(folder / "estep.json", {"rows": rows, "note": note})


def estep_row(estep: EStep, scores: Scores, calibration: Calibration) -> dict[str, Any]:
    """One row of the E-Step table: mIoU and queries per second."""
    return {
        **dataclasses.asdict(estep),
        "miou": scores.miou,
        "queries_per_second": scores.queries_per_second(),
        "calibration": calibration.to_dict(),
    }


def _write_gallery(folder: Path, scores: Scores, examples: EvalExamples) -> None:
    items = []
    for i, probability in scores.probability.items():
        tile = examples[i]
        height, width = tile["label"].shape
        probability = probability[:, :height, :width]
        counts = np.asarray(
            metrics.confusion(tile["label"][None], probability.argmax(0)[None], len(scores.classes))
        )
        present = [q for q in range(len(scores.classes)) if scores.areas[i, q] > 0]
        overlaps, areas = scores.overlaps[i : i + 1], scores.areas[i : i + 1]
        iou = metrics.query_iou(overlaps, areas)
        items.append(
            GalleryItem(
                id=tile["name"],
                image=tile["image"],
                label=tile["label"],
                prediction=probability.argmax(0).astype(np.int32),
                masks=probability[present],
                queries=[scores.classes[q] for q in present],
                ious=[None if np.isnan(iou[q]) else float(iou[q]) for q in present],
                miou=metrics.mean_iou(counts),
                note=scores.notes.get(i, ""),
            )
        )
    write_gallery(folder, items, scores.classes)
