# SPDX-License-Identifier: Apache-2.0
"""A look at a small fixed part of a split while training, so that collapsed masks are seen early."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import Config
from digseg_jax.errors import UserError
from digseg_jax.evaluation.evaluator import Evaluator
from digseg_jax.evaluation.examples import EvalExamples, eval_examples
from digseg_jax.log import log
from digseg_jax.prediction.segmenter import Segmenter
from digseg_jax.training.step import averaged
from digseg_jax.training.tasks.base import Task
from digseg_jax.training.tasks.segmentation import SegmentationTask

EMPTY_ALARM = 0.5  # share of the present queries with an empty mask that is told
OnEval = Callable[[int, Mapping[str, Any]], dict[str, float]]


def make_validation(config: Config, task: Task, mesh: Mesh) -> OnEval:
    """Builds the in-training evaluation: few images, 1x1, no calibration, so that it costs little.

    It is called with the step and the training state, and returns the columns of metrics.jsonl, shares
    of 1: val_miou, and those of `Scores.health` with val_ before their names, all of the averaged
    weights.

    Raises:
      UserError: another task, or what `validation_examples` raises.
    """
    if not isinstance(task, SegmentationTask):
        raise UserError("config.logging.eval_every: only for config.task='segmentation'; set it to 0")
    examples = validation_examples(config)

    # Built at the first call and kept, so that its programs are compiled once; only weights change.
    segmenter: Segmenter | None = None

    def on_eval(step: int, state: Mapping[str, Any]) -> dict[str, float]:
        nonlocal segmenter
        params = averaged(dict(state))
        if segmenter is None:
            segmenter = Segmenter(task, params, config.eval, mesh=mesh)

        # Same shapes, so the compiled programs fit; the old weights are freed.
        segmenter.programs.params = params
        scores = Evaluator(segmenter, examples, config.eval, seed=config.seed).scores(EStep(1, 1))
        health = scores.health()
        if health["empty_rate"] > EMPTY_ALARM:
            log.warning(
                "step %d: %.0f %% of the queries that are present have empty masks",
                step, 100 * health["empty_rate"],
            )  # fmt: skip
        return {"val_miou": scores.miou} | {f"val_{name}": v for name, v in health.items()}

    return on_eval


def validation_examples(config: Config) -> EvalExamples:
    """`logging.eval_images` examples of val, evenly spread; of the scored split where there is no val.

    Raises:
      UserError: no split can be opened, or a checkpoint would be chosen on the scored one.
    """
    limits = (config.logging.eval_images, config.eval.num_images)
    count = min((limit for limit in limits if limit), default=0)
    try:
        return eval_examples(config.data, "val", count)
    except UserError as error:
        if config.checkpoint.best:
            raise UserError(
                f"config.checkpoint.best={config.checkpoint.best!r}: without val it would be chosen on "
                f"the scored split ({error})"
            ) from error
        log.info("validation on the split %r (%s)", config.eval.split, error)
    return eval_examples(config.data, config.eval.split, count)
