# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a few fixed images during the training, so that collapsed masks are noticed early."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import DataConfig, EvalConfig
from digseg_jax.data.sources import validation_split
from digseg_jax.evaluation.evaluator import Evaluator
from digseg_jax.evaluation.examples import EvalExamples, eval_examples
from digseg_jax.evaluation.gallery import Shown
from digseg_jax.io.storage import AnyPath
from digseg_jax.io.workdir import VALIDATION
from digseg_jax.log import log
from digseg_jax.prediction.segmenter import Segmenter
from digseg_jax.training.step import averaged
from digseg_jax.training.tasks.segmentation import SegmentationTask

SHOWN = 4  # images whose masks are shown while it trains
EMPTY_ALARM = 0.5  # warn if more than this share of the present queries has an empty mask
OnEval = Callable[[int, Mapping[str, Any]], dict[str, float]]


def make_validation(
    examples: EvalExamples,
    settings: EvalConfig,
    seed: int,
    task: SegmentationTask,
    mesh: Mesh,
    workdir: AnyPath | None = None,
) -> OnEval:
    """Builds the evaluation during the training: few images, one member and step, no calibration.

    Args:
      examples: as `validation_examples` opens them.
      settings, seed: of the evaluation.
      workdir: the run's; WORKDIR/validation gets a gallery of `SHOWN` fixed images. None: no gallery.

    Returns:
      A function of the step and the training state. It returns columns of metrics.jsonl for the
      averaged weights, as shares (0..1): val_miou, and val_NAME for each entry of `Scores.health`.
    """
    folder = workdir / VALIDATION if workdir is not None else None

    # Built at the first call and kept, so that its programs are compiled once.
    segmenter: Segmenter | None = None

    def on_eval(step: int, state: Mapping[str, Any]) -> dict[str, float]:
        """Scores the state's averaged weights; warns if most masks are empty."""
        nonlocal segmenter
        params = averaged(dict(state))
        if segmenter is None:
            segmenter = Segmenter(task, params, settings, mesh=mesh)

        # Same shapes, so the compiled programs fit; the old weights are freed.
        segmenter.programs.params = params
        evaluator = Evaluator(segmenter, examples, settings, seed=seed)
        masks = folder / "masks" if folder is not None else None
        shown = Shown(SHOWN if folder is not None else 0, len(examples), masks, extremes=0)
        scores = evaluator.scores(EStep(1, 1), shown=shown)
        if folder is not None:
            shown.write(folder / "gallery", examples, scores)

        # A model that collapses answers every query with an empty mask.
        health = scores.health()
        if health["empty_rate"] > EMPTY_ALARM:
            log.warning(
                "step %d: %.0f %% of the queries that are present have empty masks",
                step, 100 * health["empty_rate"],
            )  # fmt: skip
        return {"val_miou": scores.miou} | {f"val_{name}": v for name, v in health.items()}

    return on_eval


def validation_examples(
    data: DataConfig, settings: EvalConfig, limit: int, chosen_by: str = ""
) -> EvalExamples:
    """Opens up to `limit` evenly spread examples of `validation_split`, and up to `eval.num_images`.

    limit: 0 stands for all. chosen_by: see `validation_split`.

    Raises:
      UserError: the split cannot be opened, or what `validation_split` raises.
    """
    # 0 means all images in both settings, so only positive limits count.
    limits = (limit, settings.num_images)
    count = min((each for each in limits if each), default=0)

    split = validation_split(data, settings.split, chosen_by)
    examples = eval_examples(data, split, count)
    log.info("validation during training: %d images of the split %r", len(examples), split)
    return examples
