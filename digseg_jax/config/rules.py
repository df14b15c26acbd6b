# SPDX-License-Identifier: Apache-2.0
"""Rules between the values of a configuration; `schema` has the bounds of single values.

Each check raises a UserError that names the keys, their values and what is legal.
"""

from __future__ import annotations

import functools
import re

from digseg_jax.config.codecs import QUERY_FORMS
from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import (
    CheckpointConfig,
    ComputeConfig,
    Config,
    DataConfig,
    DiffusionConfig,
    EvalConfig,
    LoggingConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    Setting,
    settings,
)
from digseg_jax.config.templates import check_template
from digseg_jax.errors import UserError


def check_combinations(config: Config) -> None:
    """Raises UserError for a key that the task does not use, or values that exclude each other."""
    for key, known in settings().items():
        _check_used(key, known, functools.reduce(getattr, key.split("."), config), config.task)

    _check_train(config.checkpoint, config.logging, config.optim, config.train.steps)
    _check_diffusion(config.diffusion)
    _check_model(config.model, config.optim)
    _check_compute(config.compute, config.model, config.mesh)
    _check_eval(config.eval)
    _check_data(config.data, config.model)
    _check_parts(config.data)
    _check_crops(config.data)
    _check_templates(config.data, config.eval, config.model)
    _check_latent_cache(config.data)


def _check_used(key: str, known: Setting, value: object, task: str) -> None:
    """Rejects a changed key that the task does not use: it would silently do nothing."""
    # Only a changed value is an error: defaults of unused keys are in every configuration.
    if known.tasks and task not in known.tasks and value != known.default:
        raise UserError(
            f"config.{key}={value!r}: config.task={task!r} does not use it, only "
            f"{', '.join(known.tasks)}; leave it at {known.default!r}"
        )


def _check_train(
    checkpoint: CheckpointConfig, logging: LoggingConfig, optim: OptimConfig, steps: int
) -> None:
    """Checks what training needs: an evaluation to choose by, a profile window, valid regexes."""
    if checkpoint.best and not 1 <= logging.eval_every <= steps:
        raise UserError(
            f"config.checkpoint.best={checkpoint.best!r}: needs config.logging.eval_every, which "
            f"measures it while training: 1 to config.train.steps={steps}, not {logging.eval_every}"
        )

    window = logging.profile
    if window and not (len(window) == 2 and 1 <= window[0] <= window[1]):
        raise UserError(
            f"config.logging.profile={window!r}: legal: (first, last) step, 1 <= first <= last"
        )

    if optim.cooldown_steps and optim.schedule != "constant":
        raise UserError(
            f"config.optim.cooldown_steps={optim.cooldown_steps}: config.optim.schedule="
            f"{optim.schedule!r} falls to its end by itself; legal: 0, or schedule='constant'"
        )

    if optim.schedule == "exponential" and optim.final_scale == 0:
        raise UserError(
            "config.optim.final_scale=0.0: an exponential decay never reaches 0; legal: above 0, or "
            "config.optim.schedule='cosine'"
        )

    # That the regex matches a parameter is checked later (`training.optim.check_freeze`).
    for pattern in optim.freeze:
        _check_regex("config.optim.freeze", pattern)


def _check_regex(key: str, pattern: str) -> None:
    """Raises UserError for what is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key}: {pattern!r} is not a regular expression ({error})") from error


def _check_diffusion(diffusion: DiffusionConfig) -> None:
    """Checks the prediction type against the schedule."""
    # With zero terminal SNR the last timestep is pure noise: predicting it says nothing of x0.
    if diffusion.zero_snr and diffusion.prediction_type == "epsilon":
        raise UserError(
            "config.diffusion.prediction_type='epsilon' is undefined at the last timestep with "
            "config.diffusion.zero_snr=True: choose v_prediction or sample, or zero_snr=False"
        )


def _check_model(model: ModelConfig, optim: OptimConfig) -> None:
    """Checks the settings of what the U-Net gets beside its checkpoint."""
    if model.unet_text and model.text_injection != "parallel":
        raise UserError(
            f"config.model.unet_text={model.unet_text!r}: config.model.text_injection="
            f"{model.text_injection!r} does not use it, only parallel; leave it at ''"
        )
    if optim.new_lr_scale != 1 and model.unet_init == "random":
        raise UserError(
            f"config.optim.new_lr_scale={optim.new_lr_scale}: config.model.unet_init='random' makes "
            "all parameters new; set config.optim.learning_rate"
        )


def _check_compute(compute: ComputeConfig, model: ModelConfig, mesh: MeshConfig) -> None:
    """Checks kernels against the types and the mesh that they can run with."""
    # cuDNN's attention kernels exist for 16-bit types only.
    if compute.attention == "cudnn" and model.dtype != "bfloat16":
        raise UserError(
            "config.compute.attention='cudnn' takes 16-bit activations only: set "
            "config.model.dtype='bfloat16', or attention to plain or chunked"
        )

    if compute.feed_forward == "fused" and mesh.tensor > 1:
        raise UserError(
            f"config.compute.feed_forward='fused' with config.mesh.tensor={mesh.tensor}: its kernel "
            "needs whole weights; set it to auto or plain"
        )


def _check_eval(evaluation: EvalConfig) -> None:
    """Checks that evaluation neither fits on what it scores nor asks for what sampling cannot do."""
    # A calibration that is fitted on the scored images would flatter the score.
    if evaluation.calibrate and evaluation.split == evaluation.calibrate_split:
        raise UserError(
            f"config.eval.split={evaluation.split!r} with config.eval.calibrate=True would fit the "
            "calibration on the images that it scores: set config.eval.calibrate=False, or another "
            "config.eval.calibrate_split (val, train)"
        )

    # The decoder latent_mean averages latents, before there are any masks to vote.
    if evaluation.ensemble_rule != "mean" and evaluation.decoder == "latent_mean":
        raise UserError(
            f"config.eval.ensemble_rule={evaluation.ensemble_rule!r} needs every member's mask: set "
            "config.eval.decoder='vae' or 'probe'"
        )

    # The empty tuple is legal: min's default lets it pass.
    if len(evaluation.view_size) > 2 or min(evaluation.view_size, default=1) < 1:
        raise UserError(
            f"config.eval.view_size={evaluation.view_size}: legal are (side,) and (height, width) in "
            "pixels, or () for config.data.image_size"
        )

    # The rows of the E-Step table, which is made after the training: an error must not come that late.
    for text in evaluation.sweep:
        try:
            EStep.parse(text)
        except UserError as error:
            raise UserError(f"config.eval.sweep: {error}") from error


def _check_data(data: DataConfig, model: ModelConfig) -> None:
    """Checks that each query keeps some text, and that a codec uses what drops texts or words."""
    queries = QUERY_FORMS[model.codec]
    if data.name_dropout and not queries.lists:
        legal = ", ".join(name for name, form in QUERY_FORMS.items() if form.lists)
        raise UserError(
            f"config.data.name_dropout={data.name_dropout}: config.model.codec={model.codec!r} does "
            f"not use it, only {legal}; leave it at 0.0"
        )

    # Without its words, a query needs a sentence token beside them.
    if data.word_dropout and queries.pooled:
        raise UserError(
            f"config.data.word_dropout={data.word_dropout}: config.model.codec={model.codec!r} reads "
            "a name as one token; leave it at 0.0"
        )
    if data.word_dropout and not model.sentence_token:
        raise UserError(
            f"config.data.word_dropout={data.word_dropout} leaves queries without any text unless "
            "config.model.sentence_token=True"
        )


def _check_parts(data: DataConfig) -> None:
    """Checks the images that parts keep aside, and that there are names of others to ask for."""
    for part in data.mixture:
        _check_regex(f"config.data.mixture, {part.folder or part.name}: held_out", part.held_out)

    # Those of other parts: a palette's classes are those of one data set.
    lends = len(data.mixture) > 1 and any(part.group for part in data.mixture)
    if data.foreign_rate and not lends:
        raise UserError(
            f"config.data.foreign_rate={data.foreign_rate}: names of other parts are asked for only in "
            "a mixture (config.data.mixture) whose parts have a group; leave it at 0.0"
        )


def _check_crops(data: DataConfig) -> None:
    """Checks the ranges of scales, of a mixture's parts too."""
    if data.scale_min > data.scale_max:
        raise UserError(
            f"config.data.scale_min={data.scale_min}, scale_max={data.scale_max}: the minimum must be "
            "at most the maximum"
        )

    # A part that sets one bound alone takes the other from the section.
    for part in data.mixture:
        low, high = part.scale_min or data.scale_min, part.scale_max or data.scale_max
        if low > high:
            raise UserError(
                f"config.data.mixture, {part.folder or part.name}: scale_min={low}, scale_max={high} "
                "(a bound that is not set is config.data's): the minimum must be at most the maximum"
            )


def _check_templates(data: DataConfig, evaluation: EvalConfig, model: ModelConfig) -> None:
    """Checks the templates of training and of evaluation."""
    for key, templates in (("data", data.templates), ("eval", evaluation.templates)):
        for template in templates:
            check_template(template, f"config.{key}.templates")

    # A query for all classes at once has no name to put into a template.
    if evaluation.templates and QUERY_FORMS[model.codec].closed:
        raise UserError(
            f"config.eval.templates={list(evaluation.templates)}: config.model.codec={model.codec!r} "
            "asks with one text whatever the class; leave it at ()"
        )


def _check_latent_cache(data: DataConfig) -> None:
    """Rejects augmentation that a latent cache cannot apply.

    The cache holds the latents of middle squares and of their mirror images: any other augmentation
    would silently do nothing.
    """
    if not data.latent_cache:
        return

    # These values turn off every other augmentation.
    legal = {
        "scale_unit": "short_side",
        "scale_min": 1.0,
        "scale_max": 1.0,
        "quarter_turns": False,
        "class_share_cap": 1.0,
        "jitter": 0.0,
        "repeat_threshold": 0.0,
    }
    if differs := [key for key, value in legal.items() if getattr(data, key) != value]:
        found = ", ".join(f"config.data.{key}={getattr(data, key)}" for key in differs)
        wanted = ", ".join(f"{key}={legal[key]}" for key in differs)
        raise UserError(
            f"{found}: cached latents are augmented by mirroring alone; with config.data.latent_cache "
            f"legal is {wanted}"
        )

    # A mixture's part may have ranges of its own.
    for part in data.mixture:
        own = {
            "short_side": part.short_side not in (0, data.image_size),
            "scale_min": part.scale_min not in (0.0, 1.0),
            "scale_max": part.scale_max not in (0.0, 1.0),
            "quarter_turns": part.quarter_turns,
            "jitter": part.jitter > 0,
        }
        if differs := [f"{key}={getattr(part, key)}" for key, is_so in own.items() if is_so]:
            raise UserError(
                f"config.data.mixture, {part.folder or part.name}: {', '.join(differs)}: cached "
                "latents are augmented by mirroring alone, and an image's short side has "
                "config.data.image_size pixels; with config.data.latent_cache leave these keys out"
            )
