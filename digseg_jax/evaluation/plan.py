# SPDX-License-Identifier: Apache-2.0
"""The plan of a training, logged before its first step: its length, and its evaluation's cost."""

from __future__ import annotations

import platform
import shlex

from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import DataConfig, EvalConfig, TrainConfig
from digseg_jax.config.templates import asked_templates
from digseg_jax.data.sources import labels_of, scored_part
from digseg_jax.data.vocabulary import training_templates
from digseg_jax.evaluation.evaluator import COARSE, THRESHOLD_IMAGES
from digseg_jax.evaluation.examples import EvalExamples, eval_examples
from digseg_jax.evaluation.fitting import choose, same_competition
from digseg_jax.evaluation.job import calibrated_on, searched_on
from digseg_jax.io.storage import AnyPath
from digseg_jax.prediction.description import installed_versions
from digseg_jax.segmentation.codec import Codec

PASSES = 3  # a train step's work for a mask, in forward passes: one, and a backward pass of two


def length(train: TrainConfig, task: str, seed: int) -> str:
    """The length of a training, and the versions that it runs with."""
    versions = {"python": platform.python_version(), **installed_versions()}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    steps = f"{train.steps:,} steps of {train.batch_size} images"
    return f"plan: {steps}, task {task}, seed {seed}; {listed}"


def cost(settings: EvalConfig, data: DataConfig, batch_size: int, codec: Codec) -> str:
    """What the evaluation after a training takes, beside the training's own steps.

    batch_size: images of a training step.
    """
    examples = eval_examples(data, settings.split, settings.num_images)
    fitted_on, searched = calibrated_on(data, settings), searched_on(data, examples)

    if not same_competition(examples, codec, settings.exhaustive_limit):
        fitted_on = None
    masks = passes(settings, data, codec, examples, fitted_on, searched)

    # What is counted in, beside the scored images under the headline's E-Step.
    also = [f"{len(settings.sweep)} more E-Steps"] if settings.sweep else []
    also += [f"a calibration of each on {len(fitted_on):,} images"] if fitted_on else []
    also += ["a threshold search"] if searched else []
    more = f", with {' and '.join(also)}" if also else ""
    step = PASSES * batch_size * codec.num_images(data.num_queries)
    return (
        f"evaluation after it: {len(examples):,} images of {settings.split!r}, {len(examples.asked)} "
        f"classes, {settings.ensemble} members x {settings.steps} steps{more}: {masks:,} passes of the "
        f"U-Net if an image is one view, the work of about {max(round(masks / step), 1):,} training "
        "steps"
    )


def passes(
    settings: EvalConfig,
    data: DataConfig,
    codec: Codec,
    examples: EvalExamples,
    fitted_on: EvalExamples | None = None,
    searched: EvalExamples | None = None,
) -> int:
    """Masks that an evaluation denoises, one step each, if every image is one view.

    Args:
      examples: that are scored, once for the headline and once for every E-Step of `eval.sweep`.
      fitted_on: images of a calibration, which each of these E-Steps has for itself; None for none.
      searched: training images for a threshold search; None for none.
    """
    headline = EStep(settings.ensemble, settings.steps, settings.spacing)
    classes, asked = len(examples.classes), len(examples.asked)

    # Texts of a query are sampled one by one, unless the codec averages their features.
    ways = asked_templates(settings.templates, training_templates(data), examples.template)
    texts = 1 if codec.pooled or codec.closed else len(ways)

    once = settings.decoder == "latent_mean" and not codec.recolored
    found = 0
    for estep in (headline, *map(EStep.parse, settings.sweep)):
        found += len(examples) * masks_of_a_view(settings, codec, asked, estep, texts)
        if fitted_on:
            members = texts * (1 if once else estep.ensemble)
            fitted = len(choose(fitted_on, classes, members)[0])
            found += fitted * _mask_images(codec, classes * texts) * estep.ensemble * estep.steps

    if searched:
        images = min(len(searched), THRESHOLD_IMAGES)
        queried = classes if codec.exclusive else 1
        each = _mask_images(codec, queried * texts) * headline.ensemble * headline.steps
        found += images * each
    return found


def masks_of_a_view(
    settings: EvalConfig, codec: Codec, classes: int, estep: EStep | None = None, texts: int = 1
) -> int:
    """Masks that are denoised, one step each, to ask a view for all classes.

    estep: by default the headline's. texts: of each query that are sampled one by one.
    """
    estep = estep or EStep(settings.ensemble, settings.steps)
    each = estep.ensemble * estep.steps
    if not codec.asks_for_all(classes, settings.exhaustive_limit):
        few = codec.gate_limit(settings.gate_limit) * texts
        looks = 0 if settings.presence_model else COARSE.ensemble * COARSE.steps
        return looks * _mask_images(codec, classes * texts) + _mask_images(codec, few) * each
    return _mask_images(codec, classes * texts) * each


def _mask_images(codec: Codec, queries: int) -> int:
    """Mask images that show all queries; a codec that joins several in one has groups of them."""
    groups = 1 if codec.closed or codec.one_by_one else -(-queries // codec.slots(queries))
    return groups * codec.num_images(queries)


def not_scored(data: DataConfig, workdir: AnyPath) -> str:
    """What a run's own evaluation leaves out of a mixture, and the command for it; "" if nothing."""
    if len(data.mixture) < 2:
        return ""
    rest = ""
    command = ["python", "-m", "digseg_jax.main", "--mode=eval", "--suite=domains"]
    command += [f"--model={workdir}/export", f"--config.data.root={data.root}", "--workdir=SCORES"]
    if data.root and any(part.folder for part in data.mixture):
        rest = (
            "; this scores all of them that are domains or lie below config.data.root: "
            f"{shlex.join(command)}"
        )
    return (
        f"this evaluation scored {labels_of([scored_part(data)])[0]} alone, of a mixture of "
        f"{len(data.mixture)} data sets{rest}"
    )
