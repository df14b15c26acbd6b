# SPDX-License-Identifier: Apache-2.0
"""Rules between the values of a configuration; `schema` has the bounds of single values.

Each check raises a UserError that names the keys, their values and what is legal.
"""

from __future__ import annotations

import functools
import re

from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import Config, DataConfig, settings
from digseg_jax.config.templates import check_template
from digseg_jax.errors import UserError


def check_combinations(c: Config) -> None:
    """Raises UserError for a key that the task does not use, or values that exclude each other."""
    _check_used(c)
    _check_train(c)
    _check_model(c)
    _check_eval(c)
    _check_data(c)
    _check_crops(c.data)
    _check_templates(c)
    _check_latent_cache(c)


def _check_used(c: Config) -> None:
    """Rejects a changed key that the task does not use: it would silently do nothing."""
    for key, setting in settings().items():
        if setting.tasks and c.task not in setting.tasks:
            # Only a changed value is an error: defaults of unused keys are in every configuration.
            value = functools.reduce(getattr, key.split("."), c)
            if value != setting.default:
                raise UserError(
                    f"config.{key}={value!r}: config.task={c.task!r} does not use it, only "
                    f"{', '.join(setting.tasks)}; leave it at {setting.default!r}"
                )


def _check_train(c: Config) -> None:
    """Checks what training needs: an evaluation to choose by, a profile window, valid regexes."""
    if c.checkpoint.best and not c.logging.eval_every:
        raise UserError(
            f"config.checkpoint.best={c.checkpoint.best!r}: needs config.logging.eval_every, which "
            "measures it while training"
        )

    if c.logging.profile and not (
        len(c.logging.profile) == 2 and 1 <= c.logging.profile[0] <= c.logging.profile[1]
    ):
        raise UserError(
            f"config.logging.profile={c.logging.profile!r}: legal: (first, last) step, "
            "1 <= first <= last"
        )

    if c.optim.cooldown_steps and c.optim.schedule != "constant":
        raise UserError(
            f"config.optim.cooldown_steps={c.optim.cooldown_steps}: config.optim.schedule="
            f"{c.optim.schedule!r} falls to its end by itself; legal: 0, or schedule='constant'"
        )

    # That the regex matches a parameter is checked later (`training.optim.check_freeze`).
    for pattern in c.optim.freeze:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"config.optim.freeze: {pattern!r} is no regular expression ({error})"
            ) from error


def _check_model(c: Config) -> None:
    """Checks the prediction type against the schedule, text against weights, kernels against types."""
    # With zero terminal SNR the last timestep is pure noise: predicting it says nothing of x0.
    if c.diffusion.zero_snr and c.diffusion.prediction_type == "epsilon":
        raise UserError(
            "config.diffusion.prediction_type='epsilon' is undefined at the last timestep with "
            "config.diffusion.zero_snr=True: choose v_prediction or sample, or zero_snr=False"
        )

    # Settings of what the U-Net gets beside its checkpoint.
    if c.model.unet_text and c.model.text_injection != "parallel":
        raise UserError(
            f"config.model.unet_text={c.model.unet_text!r}: config.model.text_injection="
            f"{c.model.text_injection!r} does not use it, only parallel; leave it at ''"
        )
    if c.optim.new_lr_scale != 1 and c.model.unet_init == "random":
        raise UserError(
            f"config.optim.new_lr_scale={c.optim.new_lr_scale}: config.model.unet_init='random' makes "
            "all parameters new; set config.optim.learning_rate"
        )

    # cuDNN's attention kernels exist for 16-bit types only.
    if c.compute.attention == "cudnn" and c.model.dtype != "bfloat16":
        raise UserError(
            "config.compute.attention='cudnn' takes 16-bit activations only: set "
            "config.model.dtype='bfloat16', or attention to plain or chunked"
        )

    if c.compute.feed_forward == "fused" and c.mesh.tensor > 1:
        raise UserError(
            f"config.compute.feed_forward='fused' with config.mesh.tensor={c.mesh.tensor}: its kernel "
            "needs whole weights; set it to auto or plain"
        )


def _check_eval(c: Config) -> None:
    """Checks that evaluation neither fits on what it scores nor asks for what sampling cannot do."""
    # A calibration that is fitted on the scored images would flatter the score.
    if c.eval.calibrate and c.eval.split == c.eval.calibrate_split:
        raise UserError(
            f"config.eval.split={c.eval.split!r} with config.eval.calibrate=True would fit the "
            "calibration on the images that it scores: set config.eval.calibrate=False, or another "
            "config.eval.calibrate_split (val, train)"
        )

    # The decoder latent_mean averages latents, before there are any masks to vote.
    if c.eval.ensemble_rule != "mean" and c.eval.decoder == "latent_mean":
        raise UserError(
            f"config.eval.ensemble_rule={c.eval.ensemble_rule!r} needs every member's mask: set "
            "config.eval.decoder='vae' or 'probe'"
        )

    # The empty tuple is legal: min's default lets it pass.
    if len(c.eval.view_size) > 2 or min(c.eval.view_size, default=1) < 1:
        raise UserError(
            f"config.eval.view_size={c.eval.view_size}: legal are (side,) and (height, width) in "
            "pixels, or () for config.data.image_size"
        )

    # The rows of the E-Step table, which is made after the training: an error must not come that late.
    for text in c.eval.sweep:
        try:
            EStep.parse(text)
        except UserError as error:
            raise UserError(f"config.eval.sweep: {error}") from error


def _check_data(c: Config) -> None:
    """Checks that each query keeps some text, and that a codec uses what drops texts or words."""
    codec, lists = c.model.codec, c.model.codec == "prompted"
    if c.data.name_dropout and not lists:
        raise UserError(
            f"config.data.name_dropout={c.data.name_dropout}: config.model.codec={codec!r} does not "
            "use it, only prompted; leave it at 0.0"
        )
    if c.data.word_dropout and lists:
        raise UserError(
            f"config.data.word_dropout={c.data.word_dropout}: config.model.codec={codec!r} reads a "
            "name as one token; leave it at 0.0"
        )
    if c.data.word_dropout and not c.model.sentence_token:
        raise UserError(
            f"config.data.word_dropout={c.data.word_dropout} leaves queries without any text unless "
            "config.model.sentence_token=True"
        )


def _check_crops(data: DataConfig) -> None:
    """Checks the range of scales."""
    if data.scale_min > data.scale_max:
        raise UserError(
            f"config.data.scale_min={data.scale_min}, scale_max={data.scale_max}: the minimum must be "
            "at most the maximum"
        )


def _check_templates(c: Config) -> None:
    """Checks the templates of training and of evaluation."""
    for key, templates in (("data", c.data.templates), ("eval", c.eval.templates)):
        for template in templates:
            check_template(template, f"config.{key}.templates")

    # A palette's query asks for all classes at once: there is no name to put into a template.
    if c.eval.templates and c.model.codec == "palette":
        raise UserError(
            f"config.eval.templates={list(c.eval.templates)}: config.model.codec='palette' asks "
            "with one text whatever the class; leave it at ()"
        )


def _check_latent_cache(c: Config) -> None:
    """Rejects augmentation that a latent cache cannot apply.

    The cache holds the latents of middle squares and of their mirror images: any other augmentation
    would silently do nothing.
    """
    if not c.data.latent_cache:
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
    if differs := [key for key, value in legal.items() if getattr(c.data, key) != value]:
        found = ", ".join(f"config.data.{key}={getattr(c.data, key)}" for key in differs)
        wanted = ", ".join(f"{key}={legal[key]}" for key in differs)
        raise UserError(
            f"{found}: cached latents are augmented by mirroring alone; with config.data.latent_cache "
            f"legal is {wanted}"
        )
