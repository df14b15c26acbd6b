# SPDX-License-Identifier: Apache-2.0
"""The E-Step grid over seeds of the members' noise, and what a cheaper decoder costs in mIoU.

One model, the land cover's held-out tiles. Each row's scale and biases are fitted as an evaluation does
it: on the val split, with as many members as the row has and the noise of the configuration's seed; the
seeds of the scored tiles tell an ensemble's gain from luck.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from digseg_jax.config.sampling import EStep
from digseg_jax.errors import UserError
from digseg_jax.evaluation.evaluator import Evaluator
from digseg_jax.evaluation.examples import EvalExamples, eval_examples
from digseg_jax.log import log
from digseg_jax.metrics import confusion
from digseg_jax.prediction.description import unet_folder
from digseg_jax.prediction.segmenter import Segmenter
from digseg_jax.runtime.sharding import make_mesh
from digseg_jax.segmentation.codecs import state_file
from digseg_jax.training.tasks.segmentation import SegmentationTask
from digseg_jax.weights import load_params
from tests.bench.landcover import bench_config
from tests.bench.spread import deviation

CALIBRATED_ON = "val"
DECODERS = ("latent_mean", "vae", "probe")


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
    grid = Grid(weights, images)
    summary = [grid.row(decoder, estep, seeds) for decoder in decoders for estep in esteps]
    return {
        "weights": weights,
        "codec": grid.task.codec.name,
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
    """The model and the tiles, which all rows share."""

    def __init__(self, weights: str, images: int):
        config, folder = bench_config(weights)
        codec = "palette" if state_file("palette", folder).is_file() else "binary"
        model = dataclasses.replace(config.model, codec=codec)
        self.config = dataclasses.replace(config, model=model)
        self.task = SegmentationTask(self.config)
        self.task.adopt(folder)
        self.params = load_params(unet_folder(folder), self.task.abstract)
        self.mesh = make_mesh(self.config.mesh)
        self.examples: EvalExamples = eval_examples(self.config.data, "test", images)
        self.fitted_on: EvalExamples = eval_examples(self.config.data, CALIBRATED_ON, images)

    def row(self, decoder: str, estep: EStep, seeds: Sequence[int]) -> dict[str, Any]:
        """mIoU of an E-Step with a decoder for every seed, and the time of an image."""
        settings = dataclasses.replace(self.config.eval, decoder=decoder)
        segmenter = Segmenter(self.task, self.params, settings, mesh=self.mesh)
        calibrating = Evaluator(segmenter, self.examples, settings, seed=self.config.seed)
        fitted = calibrating.calibrate(estep, self.fitted_on)
        confusions, before = [], segmenter.seconds
        for seed in seeds:
            scores = Evaluator(segmenter, self.examples, settings, seed=seed).scores(estep, fitted)
            confusions.append(scores.confusion)
            log.info("seed %d, %s, %s: mIoU %.4f", seed, decoder, estep, scores.miou)
        seconds = (segmenter.seconds - before) / (len(seeds) * len(self.examples))
        return _row(decoder, estep, confusions, seconds)


def _row(decoder: str, estep: EStep, confusions: list[np.ndarray], seconds: float) -> dict[str, Any]:
    mious = [confusion.mean_iou(c) for c in confusions]
    return {
        "decoder": decoder,
        "estep": str(estep),
        "miou": mious,
        "mean": statistics.fmean(mious),
        "deviation": deviation(mious),
        "accuracy": statistics.fmean(map(confusion.pixel_accuracy, confusions)),
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
