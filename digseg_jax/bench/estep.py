# SPDX-License-Identifier: Apache-2.0
"""The E-Step grid over seeds of the members' noise, and what a cheaper decoder costs in mIoU.

One model, the land cover's held-out tiles, one calibration for all rows of a decoder: these differ by
the members, the steps and the noise alone. Seeds tell an ensemble's gain from luck.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from digseg_jax.bench.landcover import bench_config
from digseg_jax.config import Config
from digseg_jax.data.landcover import GROUPS
from digseg_jax.errors import UserError
from digseg_jax.evaluate import Evaluator, Scores
from digseg_jax.log import log
from digseg_jax.segmentation import metrics
from digseg_jax.segmentation.calibration import Calibration
from digseg_jax.segmentation.inference import EStep
from digseg_jax.sharding import make_mesh
from digseg_jax.tasks.segmentation import PALETTE_NAME, SegmentationTask
from digseg_jax.weights import load_params

ROWS = ("1x2", "2x2", "4x2", "8x2")
DECODERS = ("vae", "latent_mean", "probe")
CALIBRATED_ON = "val"


def run(
    weights: str, rows: tuple[str, ...], decoders: tuple[str, ...], seeds: int, images: int
) -> dict[str, Any]:
    """mIoU, its mean and deviation over the seeds, and time, of every row with every decoder.

    Args:
      rows: E-Steps such as "8x2".
      images: of the test split, evenly spread; 0: all.

    Raises:
      UserError: no such decoder.
    """
    esteps = [EStep.parse(row) for row in rows]
    config, folder = bench_config(weights)
    codec = "palette" if (folder / PALETTE_NAME).is_file() else "binary"
    for decoder in decoders:
        if decoder not in DECODERS:
            raise UserError(f"--decoders: {decoder!r}; legal: {', '.join(DECODERS)}")
    config = dataclasses.replace(
        config,
        segmentation=dataclasses.replace(config.segmentation, codec=codec),
        eval=dataclasses.replace(config.eval, num_images=images),
    )
    found: dict[tuple[str, str], list[Scores]] = {}
    fitted: dict[str, Calibration] = {}
    for seed in range(seeds):
        task = SegmentationTask(dataclasses.replace(config, seed=seed))
        task.adopt(folder)
        params = load_params(folder, task.abstract)
        for decoder in decoders:
            evaluator = Evaluator(_with_decoder(config, decoder), task, make_mesh(config.mesh))
            examples, bank = evaluator.examples("test"), evaluator.bank(GROUPS)
            if decoder not in fitted:
                once = dataclasses.replace(esteps[0], ensemble=1)
                fitted[decoder] = evaluator.calibrate(params, bank, once, CALIBRATED_ON)
            for estep in esteps:
                scores = evaluator.scores(params, examples, bank, estep, fitted[decoder])
                log.info("seed %d, %s, %s: mIoU %.4f", seed, decoder, estep, scores.miou)
                found.setdefault((decoder, str(estep)), []).append(scores)
    summary = [_row(decoder, estep, scores) for (decoder, estep), scores in found.items()]
    return {
        "weights": weights,
        "codec": codec,
        "split": "test",
        "images": len(examples),
        "seeds": seeds,
        "calibrated_on": CALIBRATED_ON,
        "rows": summary,
        "monotone_in_members": {
            d: monotone([row for row in summary if row["decoder"] == d]) for d in decoders
        },
    }


def _with_decoder(config: Config, decoder: str) -> Config:
    return dataclasses.replace(config, eval=dataclasses.replace(config.eval, decoder=decoder))


def _row(decoder: str, estep: str, scores: list[Scores]) -> dict[str, Any]:
    mious = [s.miou for s in scores]
    return {
        "decoder": decoder,
        "estep": estep,
        "miou": mious,
        "mean": statistics.fmean(mious),
        "deviation": statistics.stdev(mious) if len(mious) > 1 else None,
        "accuracy": statistics.fmean(metrics.pixel_accuracy(s.confusion) for s in scores),
        "seconds_per_image": sum(s.seconds for s in scores) / sum(len(s.names) for s in scores),
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
