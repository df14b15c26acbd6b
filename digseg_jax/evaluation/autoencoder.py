# SPDX-License-Identifier: Apache-2.0
"""Measurements of an autoencoder: mask round-trip IoU, image error on held-out images, latent scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digseg_jax.arraytypes import Array, Params
from digseg_jax.config.schema import DataConfig
from digseg_jax.data.sources import open_fresh, scored_part, spec_of, training_parts
from digseg_jax.evaluation.examples import EvalExamples, eval_examples
from digseg_jax.models import functional
from digseg_jax.segmentation.binary import encode_binary
from digseg_jax.training.tasks.base import to_unit

SCALED_IMAGES = 50  # training images on which the latent scale is measured
MASK_PIXELS = 64  # least area of a mask that counts in the mean over single masks


def scored_split(data: DataConfig) -> str:
    """Names the split of the round trip: the one that the data set's own tables use."""
    return spec_of(scored_part(data)).eval_split


def check_scored_split(data: DataConfig) -> None:
    """Opens the split of the round trip, before anything expensive is loaded.

    Raises:
      UserError: no such data set, split or folder, or shards older than the files beside them.
    """
    open_fresh(scored_part(data), scored_split(data))


def measure_scaling(graphdef: nnx.GraphDef, params: Params, data: DataConfig, factor: int) -> float:
    """Measures the latent scaling factor: 1 / standard deviation of the latents of training images.

    Half of the latents are those of images, half those of a mask of the image's commonest class.

    factor: pixels along a side of a latent cell.
    """
    # Of a mixture, the first data set: its own name and root, not those that are evaluated.
    part, _, split = training_parts(data)[0]
    data = dataclasses.replace(data, name=part.name, root=part.root, mixture=())
    examples = eval_examples(data, split, SCALED_IMAGES)

    @jax.jit
    def moments(image: Array, label: Array) -> Array:
        """Mean and mean square of the latents of an image and its mask: [2]."""
        # The mask of the commonest class has foreground; a class at random would mostly be absent.
        common = jnp.argmax(jnp.bincount(label.ravel() + 1, length=len(examples.classes) + 1)[1:])
        mask = encode_binary(label[None], common[None, None])[:, 0]
        vae = functional.merge(graphdef, params)
        latent = vae.encode(jnp.concatenate([to_unit(image)[None], mask])).mean
        return jnp.stack([latent.mean(), jnp.square(latent).mean()])

    # Images count equally whatever their size. Variance = mean square - squared mean.
    sums = np.stack([moments(image, label) for image, label in _whole_cells(examples, factor)])
    mean, square = sums.mean(axis=0)
    return float(1.0 / np.sqrt(square - mean**2))


def round_trip(graphdef: nnx.GraphDef, params: Params, data: DataConfig, factor: int) -> dict[str, Any]:
    """Measures the round trip mask -> latent -> mask (threshold 0) of each class in held-out images.

    Returns:
      mask_iou (mean over the classes shown of the IoU pooled over images), mask_iou_per_mask (mean over
      single masks of at least 64 pixels), per_class (pooled IoU by class name; None: not shown), and
      image_mae_255 (the images' mean absolute error, 0..255).
    """
    split = scored_split(data)
    examples = eval_examples(data, split)
    n = len(examples.classes)

    @jax.jit
    def one(image: Array, label: Array) -> tuple[Array, Array, Array, Array]:
        """Intersections, unions and areas [n], and the image's mean absolute error (0..2)."""
        masks = encode_binary(label[None], jnp.arange(n)[None])[0]
        vae = functional.merge(graphdef, params)

        # One batch: the image first, then the masks of all classes, [1 + n, h, w, 3] in [-1, 1].
        decoded = vae(jnp.concatenate([to_unit(image)[None], masks]))

        # A mask's three channels are averaged; intersection and union are pixels, [n].
        predicted, true = decoded[1:].mean(axis=-1) > 0, masks[..., 0] > 0
        both, either = (predicted & true).sum((1, 2)), (predicted | true).sum((1, 2))
        error = jnp.abs(jnp.clip(decoded[0], -1, 1) - to_unit(image)).mean()
        return both, either, true.sum((1, 2)), error

    rows = [jax.device_get(one(*pair)) for pair in _whole_cells(examples, factor)]
    both, either, area = (np.stack([row[k] for row in rows]) for k in range(3))

    # Pooled IoU sums the pixels of all images; a class that no image shows has no score. The IoU of
    # single masks leaves out small ones, where a few pixels decide.
    pooled = both.sum(axis=0) / np.maximum(either.sum(axis=0), 1)
    shown = area.sum(axis=0) > 0
    single = (both / np.maximum(either, 1))[area >= MASK_PIXELS]
    named = zip(examples.classes, pooled, shown, strict=True)
    return {
        "split": split,
        "mask_iou": float(pooled[shown].mean()),
        "mask_iou_per_mask": float(single.mean()),
        "per_class": {name: float(v) if there else None for name, v, there in named},
        "image_mae_255": float(np.mean([row[3] for row in rows]) * 127.5),  # [-1, 1] spans 255 levels
    }


def _whole_cells(examples: EvalExamples, factor: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and labels without the pixels beyond the last whole latent cell."""
    for i in range(len(examples)):
        example = examples[i]
        height, width = (n // factor * factor for n in example["label"].shape)
        yield example["image"][:height, :width], example["label"][:height, :width]
