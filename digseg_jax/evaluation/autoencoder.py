# SPDX-License-Identifier: Apache-2.0
"""Measurements of an autoencoder: mask round-trip IoU, image error on held-out tiles, latent scale."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digseg_jax.arraytypes import Array, Params
from digseg_jax.data.datasets import landcover
from digseg_jax.models import functional
from digseg_jax.segmentation.binary import encode_binary
from digseg_jax.training.tasks.base import to_unit


def measure_scaling(graphdef: nnx.GraphDef, params: Params) -> float:
    """Latent scaling factor: 1 / standard deviation of the latents of training tiles.

    Half of the latents are of images, half of masks of the tile's commonest class.
    """
    cover = landcover.load()
    tiles = landcover.EvalTiles(cover, cover.tiles("train"), "groups")

    @jax.jit
    def moments(image: Array, label: Array) -> Array:
        """Mean and mean square of the latents of one tile's image and mask: [2]."""
        # The mask of the commonest class has foreground; a class at random would mostly be absent.
        common = jnp.argmax(jnp.bincount(label.ravel(), length=len(landcover.GROUPS)))
        mask = encode_binary(label[None], common[None, None])[:, 0]
        vae = functional.merge(graphdef, params)
        latent = vae.encode(jnp.concatenate([to_unit(image)[None], mask])).mean
        return jnp.stack([latent.mean(), jnp.square(latent).mean()])

    # Every 4th tile; all tiles have the same number of cells, so that moments may be averaged.
    rows = range(0, len(tiles), 4)
    sums = np.stack([moments(tiles[i]["image"], tiles[i]["label"]) for i in rows])
    mean, square = sums.mean(axis=0)
    return float(1.0 / np.sqrt(square - mean**2))


def round_trip(
    graphdef: nnx.GraphDef, params: Params, split: str, label_set: str = "groups"
) -> dict[str, Any]:
    """Round trip mask -> latent -> mask (threshold 0) of every class in each tile of a split.

    Returns:
      mask_iou (mean over classes of the IoU pooled over tiles), mask_iou_per_mask (mean over single
      masks of at least 64 pixels), per_class (pooled IoU by class name), and image_mae_255 (the images'
      mean absolute error, 0..255).
    """
    cover = landcover.load()
    tiles = landcover.EvalTiles(cover, cover.tiles(split), label_set)
    n = len(landcover.LABEL_SETS[label_set])

    @jax.jit
    def one(image: Array, label: Array) -> tuple[Array, Array, Array]:
        """Intersections [n], unions [n] and the image's mean absolute error (0..2) of one tile."""
        masks = encode_binary(label[None], jnp.arange(n)[None])[0]
        vae = functional.merge(graphdef, params)

        # One batch: the image first, then the masks of all classes, [1 + n, h, w, 3] in [-1, 1].
        decoded = vae(jnp.concatenate([to_unit(image)[None], masks]))

        # A mask's three channels are averaged; intersection and union are pixels, [n].
        predicted, true = decoded[1:].mean(axis=-1) > 0, masks[..., 0] > 0

        both, either = (predicted & true).sum((1, 2)), (predicted | true).sum((1, 2))
        return both, either, jnp.abs(jnp.clip(decoded[0], -1, 1) - to_unit(image)).mean()

    rows = [jax.device_get(one(tiles[i]["image"], tiles[i]["label"])) for i in range(len(tiles))]

    # Pooled IoU sums the pixels of all tiles; the IoU of single masks leaves out those below 64
    # pixels, where a few pixels decide.
    both, either = np.stack([r[0] for r in rows]), np.stack([r[1] for r in rows])
    areas = landcover.class_shares(cover, tiles.tiles, label_set) * landcover.TILE**2
    pooled = both.sum(axis=0) / np.maximum(either.sum(axis=0), 1)
    single = (both / np.maximum(either, 1))[areas >= 64]
    names = landcover.LABEL_SETS[label_set]
    return {
        "split": split,
        "mask_iou": float(pooled.mean()),
        "mask_iou_per_mask": float(single.mean()),
        "per_class": {name: float(v) for name, v in zip(names, pooled, strict=True)},
        "image_mae_255": float(np.mean([r[2] for r in rows]) * 127.5),  # [-1, 1] spans 255 levels
    }
