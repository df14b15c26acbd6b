# SPDX-License-Identifier: Apache-2.0
"""Training noise: Gaussian, or annealed multi-resolution (Marigold: `src/util/multi_res_noise.py`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from digseg_jax.arraytypes import Array, Float


def gaussian(key: Array, shape: tuple[int, ...]) -> Float[Array, "h w c"]:
    """Draws standard normal noise for one example."""
    return jax.random.normal(key, shape)


def multires(
    key: Array, shape: tuple[int, ...], strength: Float[Array, ""] | float
) -> Float[Array, "h w c"]:
    """Draws noise with added coarser octaves, each `strength` times weaker, scaled to unit deviation.

    The octaves halve (Marigold draws the ratio from [2, 4]; a drawn shape cannot be compiled).
    strength: 0 gives plain Gaussian noise; Marigold anneals it as 0.9 t / T.
    """
    height, width, channels = shape

    # Ten octaves at most; they end where one value covers the whole map.
    keys = jax.random.split(key, 10)
    noise = jax.random.normal(keys[0], shape)
    for level in range(1, 10):
        h, w = max(height >> level, 1), max(width >> level, 1)
        octave = jax.random.normal(keys[level], (h, w, channels))
        noise += strength**level * jax.image.resize(octave, shape, "linear")
        if h == w == 1:
            break

    return noise / jnp.std(noise)
