# SPDX-License-Identifier: Apache-2.0
"""The plan of a training, logged before its first step: its length, and its evaluation's cost."""

from __future__ import annotations

import platform

from digseg_jax.config.schema import DataConfig, EvalConfig, PartConfig, TrainConfig
from digseg_jax.data.sources import open_part, spec_of
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
    part = PartConfig(data.name, data.root)
    there, classes = len(open_part(part, settings.split)), spec_of(part).num_classes
    images = min(settings.num_images or there, there)
    masks = images * masks_of_a_view(settings, codec, classes)
    step = PASSES * batch_size * codec.num_images(data.num_queries)
    return (
        f"evaluation after it: {images:,} images of {settings.split!r}, {classes} classes, "
        f"{settings.ensemble} members x {settings.steps} steps: {masks:,} passes of the U-Net if an "
        f"image is one view, the work of about {max(round(masks / step), 1):,} training steps"
    )


def masks_of_a_view(settings: EvalConfig, codec: Codec, classes: int) -> int:
    """Masks that are denoised, one step each, to ask a view for all classes."""
    each = settings.ensemble * settings.steps
    if not codec.asks_for_all(classes, settings.exhaustive_limit):
        few = codec.gate_limit(settings.gate_limit)
        coarse = 0 if settings.presence_model else _mask_images(codec, classes)
        return coarse + _mask_images(codec, few) * each
    return _mask_images(codec, classes) * each


def _mask_images(codec: Codec, classes: int) -> int:
    """Mask images that show all classes; a codec that joins several in one has groups of them."""
    groups = 1 if codec.closed or codec.one_by_one else -(-classes // codec.slots(classes))
    return groups * codec.num_images(classes)
