# SPDX-License-Identifier: Apache-2.0
"""The E-Step grid over seeds of the members' noise, and what a cheaper decoder costs in mIoU.

One model, the land cover's held-out tiles, one calibration for all rows of a decoder: these differ by
the members, the steps and the noise alone. Seeds tell an ensemble's gain from luck. Members are nested,
so the largest ensemble is sampled once and scored for every smaller one and every decoder.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
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
from digseg_jax.evaluate import Evaluator
from digseg_jax.log import log
from digseg_jax.segmentation import metrics
from digseg_jax.segmentation.inference import DECODERS, EStep
from digseg_jax.segmentation.text_bank import PromptBank
from digseg_jax.sharding import make_mesh
from digseg_jax.tasks.segmentation import PALETTE_NAME, SegmentationTask
from digseg_jax.weights import load_params

CALIBRATED_ON = "val"


def run(
    weights: str, rows: tuple[str, ...], decoders: tuple[str, ...], seeds: int, images: int
) -> dict[str, Any]:
    """mIoU, its mean and deviation over the seeds, and time, of every row with every decoder.

    Args:
      rows: E-Steps such as "8x2".
      images: of the test split, and of the val split that calibrates, evenly spread; 0: all.

    Raises:
      UserError: no such decoder.
    """
    esteps = [EStep.parse(row) for row in rows]
    for decoder in decoders:
        if decoder not in DECODERS:
            raise UserError(f"--decoders: {decoder!r}; legal: {', '.join(DECODERS)}")
    grid = Grid(weights, decoders, images)
    fitted = {d: grid.calibrate(d, dataclasses.replace(esteps[0], ensemble=1)) for d in decoders}
    confusions = grid.confusions(esteps, fitted, seeds)
    summary = []
    for decoder in decoders:
        for estep in esteps:
            seconds = grid.seconds_per_image(decoder, estep, fitted[decoder])
            summary.append(_row(decoder, estep, confusions[decoder, estep], seconds))
    return {
        "weights": weights,
        "codec": grid.task.codec,
        "split": "test",
        "images": len(grid.examples),
        "seeds": seeds,
        "calibrated_on": CALIBRATED_ON,
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

    def calibrate(self, decoder: str, estep: EStep) -> Params:
        """Scale and biases of a decoder."""
        found = self.evaluators[decoder].calibrate(self.params, self.bank, estep, CALIBRATED_ON)
        return {"scale": np.float32(found.scale), "bias": np.float32(found.bias)}

    def confusions(
        self, esteps: list[EStep], fitted: dict[str, Params], seeds: int
    ) -> dict[tuple[str, EStep], list[np.ndarray]]:
        """Confusion matrices of every decoder and row, one a seed."""
        found = {(d, e): [] for d in fitted for e in esteps}
        for steps, spacing in dict.fromkeys((e.steps, e.spacing) for e in esteps):
            members = sorted(e.ensemble for e in esteps if (e.steps, e.spacing) == (steps, spacing))
            program = self.any.jit(self._nested(members, steps, spacing), shared=4)
            for seed in range(seeds):
                label = f"seed {seed}, {members[-1]}x{steps}"
                total: dict[Any, np.ndarray] = {}
                for batch, _ in self.any.batches(self.examples, label):
                    frozen, key = self.any.frozen(self.bank), jax.random.key(seed)
                    for name, counts in program(self.params, frozen, fitted, key, batch).items():
                        total[name] = total.get(name, 0) + np.asarray(counts, np.int64)
                for (decoder, ensemble), counts in total.items():
                    found[decoder, EStep(ensemble, steps, spacing)].append(counts)
                    miou = metrics.mean_iou(counts)
                    log.info("seed %d, %s, %dx%d: mIoU %.4f", seed, decoder, ensemble, steps, miou)
        return found

    def _nested(self, members: list[int], steps: int, spacing: str) -> Callable[..., Any]:
        """The program that counts for each number of members, the first ones of the largest."""

        def program(
            params: Params, frozen: Params, fitted: dict[str, Params], key: Array, batch: Params
        ) -> dict[tuple[str, int], Array]:
            estep = EStep(members[-1], steps, spacing)
            image, index = batch["image"], batch["index"]
            latents = self.task.sample(params, frozen, image, index, estep, seed=key)
            counts = {}
            for decoder, evaluator in self.evaluators.items():
                read = partial(self.task.read, frozen, size=image.shape[1:3], decoder=decoder)
                if decoder == "latent_mean":
                    evidence = {e: read(latents[:, :, :e]) for e in members}
                else:  # members are decoded one by one, so once for all
                    whole = read(latents)
                    evidence = {e: whole[:, :, :e] for e in members}
                for ensemble, part in evidence.items():
                    found = evaluator.counts(part, fitted[decoder], batch, len(self.examples.classes))
                    counts[decoder, ensemble] = found["confusion"].sum(axis=0)
            return counts

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
