# SPDX-License-Identifier: Apache-2.0
"""A specialist for each domain of the generalist: configs/generalist.py:DOMAIN, trained and scored.

All specialists together take as many steps as the one generalist, from the same start.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from digseg_jax.config.experiment import load_config
from digseg_jax.data.datasets.domains import Domain
from digseg_jax.errors import UserError
from digseg_jax.evaluation.domains import domain_examples
from digseg_jax.evaluation.evaluator import Evaluator
from digseg_jax.log import log
from digseg_jax.prediction.segmenter import Segmenter
from digseg_jax.runtime.sharding import make_mesh
from digseg_jax.training.loop import Trainer
from digseg_jax.training.setup import Setup
from digseg_jax.training.step import averaged
from digseg_jax.training.tasks.segmentation import SegmentationTask
from tests.bench.domain_scores import chosen_domains, mean_row
from tests.bench.prior import ESTEP


def run(
    root: str,
    runs: str,
    split: str,
    images: int,
    steps: int = 0,
    only: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Mean IoU of a specialist on every domain.

    Args:
      root: folder of all domains.
      runs: folder of the trainings; one that was killed goes on, one that has ended is scored.
      split: as --config.eval.split takes it in the suite.
      images: of the scored split, evenly spread; 0: all.
      steps: of each training; 0: what the recipe has.
      only: names of domains, in the order in which they are trained; empty: all.
      seed: of the crops, the queries and the noise.
    """
    rows: dict[str, Any] = {}
    for domain in chosen_domains(only):
        try:
            rows[domain.name] = _one(domain, root, runs, split, images, steps, seed)
        except UserError as error:
            rows[domain.name] = {"missing": str(error)}
        log.info("%s: %s", domain.name, rows[domain.name])
    facts = {"split": split, "seed": seed, "estep": str(ESTEP)}
    return facts | {"domains": rows, "mean": mean_row(rows)}


def _one(
    domain: Domain, root: str, runs: str, split: str, images: int, steps: int, seed: int
) -> dict[str, Any]:
    """The row of one domain."""
    examples = domain_examples(domain, root, split, images)
    settings: dict[str, Any] = {"data.root": root, "seed": seed}
    if steps:
        settings |= {"train.steps": steps, "optim.cooldown_steps": round(0.28 * steps)}
    config = load_config(f"generalist:{domain.name}", **settings)

    # Seconds of this process alone: a run that was killed earlier says less than it took.
    task, mesh = SegmentationTask(config), make_mesh(config.mesh)
    started = time.process_time()
    state = Trainer(Setup(config, task, mesh), str(Path(runs) / domain.name)).run()
    minutes = (time.process_time() - started) / 60

    segmenter = Segmenter(task, averaged(state), mesh=mesh).seen_at(domain.short_side)
    scores = Evaluator(segmenter, examples, config.eval, seed=seed).scores(ESTEP)
    asked = {examples.classes[c] for c in examples.asked}
    return {
        "asked_miou": scores.own_metric()["asked_miou"],
        "images": len(examples),
        "split": examples.split,
        "steps": config.train.steps,
        "minutes": round(minutes, 1),
        "per_class": {name: iou for name, iou in scores.per_class().items() if name in asked},
    }
