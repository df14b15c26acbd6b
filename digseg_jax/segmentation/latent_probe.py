# SPDX-License-Identifier: Apache-2.0
"""A linear probe that reads masks from latents, without the decoder.

Latents of binary masks are close to linearly separable (GenMask, arXiv 2603.23906), so a least-squares
fit of one weight per channel and an offset gives the coverage of each latent cell. The fit needs only
the autoencoder: it encodes synthetic masks, so no data set and no split is involved.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from digseg_jax.arraytypes import Array, Float
from digseg_jax.segmentation.synthetic import synthetic_maps

Encode = Callable[[np.ndarray], np.ndarray]  # images [n H W 3] in [-1, 1] to scaled latents [n h w c]


@dataclasses.dataclass(frozen=True)
class LatentProbe:
    """evidence = latent . weight + offset; `r2` is the share of the coverage's variance explained."""

    weight: np.ndarray  # [c]
    offset: float
    r2: float

    def __call__(self, latent: Float[Array, "*b h w c"]) -> Float[Array, "*b h w"]:
        """Evidence of each latent cell, clipped to [-1, 1] as a decoded mask is."""
        # All bits: TPUs and GPUs would round the factors.
        exact = jax.lax.Precision.HIGHEST
        evidence = jnp.matmul(latent, jnp.asarray(self.weight), precision=exact) + self.offset
        return jnp.clip(evidence, -1.0, 1.0)


def fit_probe(encode: Encode, count: int = 32, size: int = 64) -> LatentProbe:
    """Fits a probe by least squares on the latents of `count` synthetic masks of `size` pixels."""
    # Masks in [-1, 1], their latents, and the mean of each mask over each latent cell.
    masks = 2.0 * synthetic_maps(count, 2, size).astype(np.float32) - 1.0
    latent = np.asarray(encode(np.broadcast_to(masks[..., None], (*masks.shape, 3))), np.float64)
    n, h, w, c = latent.shape
    coverage = masks.reshape(n, h, size // h, w, size // w).mean(axis=(2, 4)).reshape(-1)

    # One row per cell: its channels and a 1 for the offset.
    table = np.concatenate([latent.reshape(-1, c), np.ones((n * h * w, 1))], axis=1)
    solution = np.linalg.lstsq(table, coverage, rcond=None)[0]
    residual = coverage - table @ solution
    r2 = 1.0 - residual.var() / coverage.var()
    return LatentProbe(solution[:c].astype(np.float32), float(solution[c]), float(r2))


def enlarge(evidence: Float[Array, "*b h w"], height: int, width: int) -> Float[Array, "*b H W"]:
    """Resizes evidence from latent cells to pixels, bilinearly."""
    return jax.image.resize(evidence, (*evidence.shape[:-2], height, width), "linear")
