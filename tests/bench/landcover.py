# SPDX-License-Identifier: Apache-2.0
"""The finished segmenter against boosted trees on the same tiles; how far it listens to the text."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from digseg_jax import assets
from digseg_jax.config.parse import parse
from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import Config
from digseg_jax.data.datasets import landcover
from digseg_jax.data.datasets.landcover_prompts import HELD_OUT
from digseg_jax.evaluation.evaluator import Evaluator
from digseg_jax.evaluation.examples import eval_examples
from digseg_jax.evaluation.scores import Scores
from digseg_jax.log import log
from digseg_jax.metrics import confusion
from digseg_jax.prediction.description import unet_folder
from digseg_jax.prediction.segmenter import Segmenter
from digseg_jax.recipes import land_cover
from digseg_jax.segmentation.calibration import Calibration
from digseg_jax.training.tasks.parts import choose_kernels
from digseg_jax.training.tasks.segmentation import SegmentationTask
from digseg_jax.weights import load_params
from tests.bench import trees

HEADLINE = EStep(2, 2)


def bench_config(weights: str) -> tuple[Config, Path]:
    """A config that evaluates a folder of exported weights."""
    folder = Path(assets.resolve(weights))
    base = parse(land_cover())
    model = dataclasses.replace(base.model, unet=str(unet_folder(folder)))
    evaluation = dataclasses.replace(base.eval, view_size=(landcover.TILE,))
    config = dataclasses.replace(base, model=model, eval=evaluation)
    kernels = choose_kernels(config.compute, jax.devices(), config.model.dtype, config.mesh.tensor)
    return dataclasses.replace(config, compute=kernels), folder


def run(weights: str) -> dict[str, Any]:
    """Everything measured in this run, on the test split."""
    config, folder = bench_config(weights)
    task = SegmentationTask(config)
    params = load_params(unet_folder(folder), task.abstract)
    segmenter = Segmenter(task, params)
    tiles = eval_examples(config.data, "test")
    evaluator = Evaluator(segmenter, tiles, config.eval, seed=config.seed)
    fitted = evaluator.calibrate(HEADLINE, eval_examples(config.data, "val"))
    scores = evaluator.scores(HEADLINE, fitted)
    baseline = trees.fit_and_count(landcover.load(), "groups", "test")
    ours = confusion.iou_per_class(scores.confusion)
    theirs = confusion.iou_per_class(baseline)
    return {
        "split": "test",
        "num_images": len(tiles),
        "estep": str(HEADLINE),
        "ours_miou": scores.miou,
        "trees_miou": confusion.mean_iou(baseline),
        "ours_accuracy": confusion.pixel_accuracy(scores.confusion),
        "trees_accuracy": confusion.pixel_accuracy(baseline),
        "ours_per_class": _named(ours),
        "trees_per_class": _named(theirs),
        "calibration": fitted.to_dict(),
        "queries_per_second": scores.speed()["queries_per_second"],
        **scores.single_queries(),
        **unseen_queries(evaluator, fitted, scores),
    }


def unseen_queries(evaluator: Evaluator, fitted: Calibration, known: Scores) -> dict[str, Any]:
    """Each held-out name in place of its group's trained name; IoU of the masks on their own."""
    names = {group: unseen for unseen, group in HELD_OUT.items()}
    queries = [names.get(group, group) for group in landcover.GROUPS]
    asked = Evaluator(
        evaluator.segmenter,
        evaluator.examples,
        evaluator.settings,
        seed=evaluator.seed,
        prompts=queries,
    )
    scores = asked.scores(HEADLINE, fitted)
    trained = confusion.query_iou(known.overlaps, known.areas)
    unseen = confusion.query_iou(scores.overlaps, scores.areas)
    rows = {}
    for i, (group, query) in enumerate(zip(landcover.GROUPS, queries, strict=True)):
        if query != group:
            rows[query] = {"trained_name": group, "trained": trained[i], "unseen": unseen[i]}
            log.info("%s: %.3f, trained name %s: %.3f", query, unseen[i], group, trained[i])
    kept = np.mean([r["unseen"] for r in rows.values()]) / max(
        np.mean([r["trained"] for r in rows.values()]), 1e-9
    )
    return {"unseen_queries": rows, "unseen_kept": float(kept)}


def _named(values: np.ndarray) -> dict[str, float | None]:
    named = zip(landcover.GROUPS, values, strict=True)
    return {name: None if math.isnan(v) else float(v) for name, v in named}
