# SPDX-License-Identifier: Apache-2.0
"""Draws label maps, to measure what an autoencoder does to masks without any data set."""

from __future__ import annotations

import numpy as np

from digseg_jax.arraytypes import Int


def synthetic_maps(
    count: int, num_classes: int, size: int = 64, sites: int = 12, seed: int = 0
) -> Int[np.ndarray, "n size size"]:
    """Draws label maps of Voronoi cells: a pixel has the class of the nearest of random points.

    Args:
      count: n, number of maps.
      num_classes: classes are drawn from 0..num_classes-1.
      size: pixels of a side.
      sites: points of a map.
      seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), axis=-1)
    maps = []
    for _ in range(count):
        places = rng.uniform(0, size, (sites, 2))
        owner = np.square(grid[:, :, None] - places).sum(axis=-1).argmin(axis=-1)
        maps.append(rng.integers(0, num_classes, sites)[owner])
    return np.stack(maps)
