# SPDX-License-Identifier: Apache-2.0
"""The E-Step grid over seeds of the members' noise, and what a cheaper decoder costs in mIoU.

One model, the land cover's held-out tiles. Each row's scale and biases are fitted as an evaluation does
it: on the val split, with as many members as the row has and the noise of the configuration's seed; the
seeds of the scored tiles tell an ensemble's gain from luck. Members are nested, so the largest ensemble
is sampled once and read for every smaller one and every decoder.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from digseg_jax.arraytypes import Array, Params
from digseg_jax.bench.landcover import bench_config
from digseg_jax.config import Config
from digseg_jax.data.evaluation import EvalExamples
from digseg_jax.data.landcover import GROUPS
from digseg_jax.errors import UserError
from digseg_jax.evaluate import Evaluator, by_pixel, subsampled, subsampled_labels
from digseg_jax.log import log
from digseg_jax.segmentation import calibration, metrics
from digseg_jax.segmentation.inference import DECODERS, EStep
from digseg_jax.segmentation.text_bank import PromptBank
from digseg_jax.sharding import make_mesh
from digseg_jax.tasks.segmentation import PALETTE_NAME, SegmentationTask
from digseg_jax.weights import load_params

CALIBRATED_ON = "val"

Row = tuple[str, int]  # decoder, members
# what a row's evidence [n q e h w] of a batch becomes
Reduce = Callable[[Row, Array, Params], Array]


def run(
    weights: str, rows: tuple[str, ...], decoders: tuple[str, ...], seeds: Sequence[int], images: int
) -> dict[str, Any]:
    """mIoU, its mean and deviation over the seeds, and time, of every row with every decoder.

    Args:
      rows: E-Steps such as "8x2".
      seeds: of the noise on the scored tiles.
      images: of the test split, and of the val split that calibrates, evenly spread; 0: all.

    Raises:
      UserError: no such decoder.
    """
    esteps = [EStep.parse(row) for row in rows]
    for decoder in decoders:
        if decoder not in DECODERS:
            raise UserError(f"--decoders: {decoder!r}; legal: {', '.join(DECODERS)}")
    grid = Grid(weights, decoders, images)
    confusions, seconds = {}, {}
    for steps, spacing in dict.fromkeys((e.steps, e.spacing) for e in esteps):
        same = [e for e in esteps if (e.steps, e.spacing) == (steps, spacing)]
        fitted = grid.calibrate(same)
        for (decoder, members), found in grid.confusions(same, fitted, seeds).items():
            estep = EStep(members, steps, spacing)
            confusions[decoder, estep] = found
            seconds[decoder, estep] = grid.seconds_per_image(decoder, estep, fitted[decoder, members])
    summary = [
        _row(decoder, estep, confusions[decoder, estep], seconds[decoder, estep])
        for decoder in decoders
        for estep in esteps
    ]
    return {
        "weights": weights,
        "codec": grid.task.codec,
        "split": "test",
        "images": len(grid.examples),
        "seeds": list(seeds),
        "calibrated_on": CALIBRATED_ON,  # with as many members as the row has
        "rows": summary,
        "monotone_in_members": {
            d: monotone([row for row in summary if row["decoder"] == d]) for d in decoders
        },
    }


class Grid:
    """The model, the tiles and the queries, which all rows share."""

    def __init__(self, weights: str, decoders: tuple[str, ...], images: int):
        config, folder = bench_config(weights)
        codec = "palette" if (folder / PALETTE_NAME).is_file() else "binary"
        segmentation = dataclasses.replace(config.segmentation, codec=codec)
        few = dataclasses.replace(config.eval, num_images=images, calibrate_images=images)
        config = dataclasses.replace(config, segmentation=segmentation, eval=few)
        self.task = SegmentationTask(config)
        self.task.adopt(folder)
        self.params = load_params(folder, self.task.abstract)
        mesh = make_mesh(config.mesh)
        self.evaluators = {d: Evaluator(_with_decoder(config, d), self.task, mesh) for d in decoders}
        self.any = self.evaluators[decoders[0]]
        self.examples: EvalExamples = self.any.examples("test")
        self.bank: PromptBank = self.any.bank(GROUPS)

    def calibrate(self, esteps: list[EStep]) -> dict[Row, Params]:
        """Scale and biases of every row, of E-Steps that differ in their members alone."""

        def few(row: Row, evidence: Array, batch: Params) -> Array:
            return subsampled(evidence, batch)

        program = self.any.jit(self._nested(esteps, few), shared=3)
        examples = self.any.examples(CALIBRATED_ON)
        key, labels = jax.random.key(self.task.config.seed), []
        parts: dict[Row, list[np.ndarray]] = {}
        for batch, names in self.any.batches(examples, f"calibration x{esteps[0].steps}"):
            found = program(self.params, self.any.frozen(self.bank), key, batch)
            for row, evidence in found.items():
                parts.setdefault(row, []).append(by_pixel(np.asarray(evidence)[: len(names)]))
            labels.append(subsampled_labels(batch, len(names)))
        label, scale = np.concatenate(labels), self.any.fixed_scale()
        fits = {
            row: calibration.fit(np.concatenate(part), label, CALIBRATED_ON, scale)
            for row, part in parts.items()
        }
        return {
            row: {"scale": np.float32(fit.scale), "bias": np.float32(fit.bias)}
            for row, fit in fits.items()
        }

    def confusions(
        self, esteps: list[EStep], fitted: dict[Row, Params], seeds: Sequence[int]
    ) -> dict[Row, list[np.ndarray]]:
        """Confusion matrices of every row, one a seed; the E-Steps differ in their members alone."""
        classes = len(self.examples.classes)

        def count(row: Row, evidence: Array, batch: Params) -> Array:
            evaluator = self.evaluators[row[0]]
            return evaluator.counts(evidence, fitted[row], batch, classes)["confusion"].sum(axis=0)

        program = self.any.jit(self._nested(esteps, count), shared=3)
        found: dict[Row, list[np.ndarray]] = {}
        for seed in seeds:
            total: dict[Row, np.ndarray] = {}
            for batch, _ in self.any.batches(self.examples, f"seed {seed}, x{esteps[0].steps}"):
                frozen, key = self.any.frozen(self.bank), jax.random.key(seed)
                for row, counts in program(self.params, frozen, key, batch).items():
                    total[row] = total.get(row, 0) + np.asarray(counts, np.int64)
            for (decoder, members), counts in total.items():
                found.setdefault((decoder, members), []).append(counts)
                miou = metrics.mean_iou(counts)
                log.info("seed %d, %s, %dx%d: mIoU %.4f", seed, decoder, members, esteps[0].steps, miou)
        return found

    def _nested(self, esteps: list[EStep], reduce: Reduce) -> Callable[..., dict[Row, Array]]:
        """The program that reads each number of members, the first ones of the largest."""
        largest = max(esteps, key=lambda e: e.ensemble)
        members = sorted({e.ensemble for e in esteps})

        def program(params: Params, frozen: Params, key: Array, batch: Params) -> dict[Row, Array]:
            image, index = batch["image"], batch["index"]
            latents = self.task.sample(params, frozen, image, index, largest, seed=key)
            rows = {}
            for decoder in self.evaluators:
                read = partial(self.task.read, frozen, size=image.shape[1:3], decoder=decoder)
                if decoder == "latent_mean":
                    evidence = {e: read(latents[:, :, :e]) for e in members}
                else:  # members are decoded one by one, so once for all
                    whole = read(latents)
                    evidence = {e: whole[:, :, :e] for e in members}
                for ensemble, part in evidence.items():
                    rows[decoder, ensemble] = reduce((decoder, ensemble), part, batch)
            return rows

        return program

    def seconds_per_image(self, decoder: str, estep: EStep, fitted: Params) -> float:
        """Of an evaluation's own program on the first batch, compilation excluded; best of two."""
        evaluator = self.evaluators[decoder]
        program = evaluator.counting(estep, len(self.examples.classes))
        batch, names = next(iter(evaluator.batches(self.examples, f"time of {decoder}, {estep}")))
        arguments = (self.params, evaluator.frozen(self.bank), fitted, batch)
        jax.block_until_ready(program(*arguments))
        times = []
        for _ in range(2):
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            times.append(time.perf_counter() - start)
        return min(times) / evaluator.batch_size


def _with_decoder(config: Config, decoder: str) -> Config:
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, decoder=decoder))


def _row(decoder: str, estep: EStep, confusions: list[np.ndarray], seconds: float) -> dict[str, Any]:
    mious = [metrics.mean_iou(c) for c in confusions]
    return {
        "decoder": decoder,
        "estep": str(estep),
        "miou": mious,
        "mean": statistics.fmean(mious),
        "deviation": statistics.stdev(mious) if len(mious) > 1 else None,
        "accuracy": statistics.fmean(map(metrics.pixel_accuracy, confusions)),
        "seconds_per_image": seconds,
    }


def monotone(rows: list[dict[str, Any]]) -> bool:
    """Whether the mean never falls with more members, at the same steps and spacing."""
    groups: dict[tuple[int, str], list[tuple[int, float]]] = {}
    for row in rows:
        estep = EStep.parse(row["estep"])
        groups.setdefault((estep.steps, estep.spacing), []).append((estep.ensemble, row["mean"]))
    means = [[mean for _, mean in sorted(group)] for group in groups.values()]
    return all(a <= b for group in means for a, b in zip(group, group[1:], strict=False))


def table(result: dict[str, Any]) -> str:
    """Rows for people."""
    lines = [f"{'decoder':<12}{'E x S':>12}{'mIoU':>9}{'deviation':>11}{'accuracy':>10}{'s/image':>9}"]
    for row in result["rows"]:
        spread = "-" if row["deviation"] is None else f"{row['deviation']:.4f}"
        lines.append(
            f"{row['decoder']:<12}{row['estep']:>12}{row['mean']:>9.4f}{spread:>11}"
            f"{row['accuracy']:>10.4f}{row['seconds_per_image']:>9.3f}"
        )
    return "\n".join(lines)
