# SPDX-License-Identifier: Apache-2.0
"""The paper's claim in miniature: the same fine-tuning from the prior and from random weights."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from typing import Any

from digseg_jax.config.parse import parse
from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import Config
from digseg_jax.data.datasets.landcover import TILE
from digseg_jax.evaluation.evaluator import Evaluator
from digseg_jax.evaluation.examples import eval_examples
from digseg_jax.log import log
from digseg_jax.metrics import confusion
from digseg_jax.prediction.segmenter import Segmenter
from digseg_jax.recipes import land_cover
from digseg_jax.runtime.sharding import make_mesh
from digseg_jax.training.loop import Trainer
from digseg_jax.training.setup import Setup
from digseg_jax.training.step import averaged
from digseg_jax.training.tasks.segmentation import SegmentationTask
from tests.bench.spread import deviation

ESTEP = EStep(1, 1)


def one(config: Config) -> dict[str, float]:
    """Trains in a scratch directory; mIoU on test at 1x1 without calibration."""
    task, mesh = SegmentationTask(config), make_mesh(config.mesh)
    with tempfile.TemporaryDirectory() as scratch:
        state = Trainer(Setup(config, task, mesh), scratch).run()
    segmenter = Segmenter(task, averaged(state), mesh=mesh)
    examples = eval_examples(config.data, "test", config.eval.num_images)
    scores = Evaluator(segmenter, examples, config.eval, seed=config.seed).scores(ESTEP)
    return {"miou": scores.miou, "accuracy": confusion.pixel_accuracy(scores.confusion)}


def run(seeds: int, steps: int) -> dict[str, Any]:
    """Mean and spread over seeds of both starts; only the start differs within a seed."""
    base = parse(land_cover())
    base = dataclasses.replace(base, eval=dataclasses.replace(base.eval, view_size=(TILE,)))
    rows: dict[str, list[dict[str, float]]] = {"pretrained": [], "random": []}
    for seed in range(seeds):
        for start in rows:
            config = dataclasses.replace(
                base,
                seed=seed,
                data=dataclasses.replace(base.data, text_noise=0.2),
                model=dataclasses.replace(base.model, unet_init=start),
                optim=dataclasses.replace(base.optim, ema_decay=0.99),
                train=dataclasses.replace(base.train, steps=steps),
            )
            rows[start].append(one(config))
            log.info("seed %d, %s: %s", seed, start, rows[start][-1])
    summary = {
        f"{start}_{name}_{kind}": function([r[name] for r in values])
        for start, values in rows.items()
        for name in ("miou", "accuracy")
        for kind, function in (("mean", statistics.fmean), ("std", deviation))
    }
    result = {"steps": steps, "seeds": seeds, "estep": str(ESTEP), **summary, "runs": rows}
    return result | as_table(result)


def as_table(result: dict[str, Any]) -> dict[str, Any]:
    """What a report shows of it, if the file lies in RUN/bench (`report.sections.bench_tables`)."""
    kinds = ("miou_mean", "miou_std", "accuracy_mean", "accuracy_std")
    names = {"pretrained": "from the prior", "random": "from scratch"}
    return {
        "title": f"Does the prior help? {result['steps']} steps, {result['seeds']} seeds, "
        f"{result['estep']}, uncalibrated",
        "columns": ["start", "mIoU", "±", "accuracy", "±"],
        "rows": [[name, *(result[f"{start}_{k}"] for k in kinds)] for start, name in names.items()],
    }
