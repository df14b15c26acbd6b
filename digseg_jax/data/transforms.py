# SPDX-License-Identifier: Apache-2.0
"""Crops and flips of an example in NumPy; every draw comes from the generator that is passed in."""

from __future__ import annotations

import numpy as np

Example = dict[str, np.ndarray]


def random_crop(example: Example, size: int, rng: np.random.Generator) -> Example:
    """A size x size crop at a uniformly drawn position; arrays are [h, w, ...] of one h, w.

    Raises:
      ValueError: the example is smaller than the crop.
    """
    height, width = example["image"].shape[:2]
    if min(height, width) < size:
        raise ValueError(f"crop of {size} pixels from an image of {height}x{width}")
    top = int(rng.integers(height - size + 1))
    left = int(rng.integers(width - size + 1))
    return {k: v[top : top + size, left : left + size] for k, v in example.items()}


def random_dihedral(example: Example, rng: np.random.Generator) -> Example:
    """One of the square's eight symmetries: seen from above, north is a convention."""
    turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
    turned = {k: np.rot90(v, turns) for k, v in example.items()}
    return {k: v[:, ::-1] if mirror else v for k, v in turned.items()}
