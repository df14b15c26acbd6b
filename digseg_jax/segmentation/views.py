# SPDX-License-Identifier: Apache-2.0
"""Pictures of any size to squares of one size and back: whole, aspect-preserving, sliding window.

Every square has the size the model was trained at, so that no picture compiles anything anew. What
comes back is brought to the picture's own resolution as probabilities, never as labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from digseg_jax.arraytypes import Float, UInt8
from digseg_jax.segmentation.resolution import resize_image, resize_probability, to_short_side

MODES = ("window", "whole", "aspect")
OVERLAP = 0.25  # of a window's side, at least


@dataclasses.dataclass(frozen=True)
class Views:
    """The squares of one picture, and how their probabilities become the picture's.

    crops: uint8 [k, s, s, 3]. assemble: probabilities [k, q, s, s] -> [q, h, w] of the picture.
    """

    crops: UInt8[np.ndarray, "k s s 3"]
    assemble: Callable[[Float[np.ndarray, "k q s s"]], Float[np.ndarray, "q h w"]]


def make_views(image: UInt8[np.ndarray, "h w 3"], size: int, mode: str, short_side: int = 0) -> Views:
    """Cuts a picture.

    whole: squeezed to one square. aspect: the long side becomes `size`, the rest is mirrored padding
    that is cut off again. window: overlapping squares at the picture's own resolution, or with its
    short side brought to `short_side` pixels; blended with a weight that falls towards their borders.

    Raises:
      ValueError: another mode, or a picture without pixels.
    """
    if mode not in MODES:
        raise ValueError(f"inference {mode!r}; legal: {', '.join(MODES)}")
    if image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"image has shape {image.shape}; expected [h, w, 3] with some pixels")
    if mode == "window" and short_side:
        views, shape = _windows(to_short_side(image, short_side), size), image.shape[:2]
        return Views(views.crops, lambda p: resize_probability(views.assemble(p), *shape))
    return {"whole": _whole, "aspect": _aspect, "window": _windows}[mode](image, size)


def _whole(image: np.ndarray, size: int) -> Views:
    height, width = image.shape[:2]
    crops = resize_image(image, size, size)[None]
    return Views(crops, lambda p: resize_probability(p[0], height, width))


def _aspect(image: np.ndarray, size: int) -> Views:
    height, width = image.shape[:2]
    scale = size / max(height, width)
    h, w = (max(1, min(size, round(n * scale))) for n in (height, width))
    crops = _pad(resize_image(image, h, w), size)[None]
    return Views(crops, lambda p: resize_probability(p[0, :, :h, :w], height, width))


def _windows(image: np.ndarray, size: int) -> Views:
    height, width = image.shape[:2]
    padded = _pad(image, size)
    rows, columns = (starts(n, size) for n in padded.shape[:2])
    corners = [(top, left) for top in rows for left in columns]
    crops = np.stack([padded[t : t + size, le : le + size] for t, le in corners])

    def assemble(probability: np.ndarray) -> np.ndarray:
        weight = window_weight(size)
        total = np.zeros((probability.shape[1], *padded.shape[:2]), np.float64)
        weights = np.zeros(padded.shape[:2], np.float64)
        for (top, left), p in zip(corners, probability, strict=True):
            total[:, top : top + size, left : left + size] += p * weight
            weights[top : top + size, left : left + size] += weight
        return (total / weights)[:, :height, :width].astype(np.float32)

    return Views(crops, assemble)


def starts(length: int, size: int) -> list[int]:
    """Window starts that cover `length` evenly, at most three quarters of a window apart."""
    count = 1 + int(np.ceil(max(length - size, 0) / ((1 - OVERLAP) * size)))
    return [int(s) for s in np.linspace(0, length - size, count).round()]


def window_weight(size: int) -> Float[np.ndarray, "size size"]:
    """Highest in the middle, small but positive at the border."""
    ramp = np.minimum(np.arange(1, size + 1), np.arange(size, 0, -1)) / (size / 2)
    return np.clip(np.outer(ramp, ramp), 1e-3, None)


def _pad(image: np.ndarray, size: int) -> np.ndarray:
    """To at least size x size, right and below."""
    height, width = image.shape[:2]
    pad = [(0, max(size - height, 0)), (0, max(size - width, 0)), (0, 0)]
    return np.pad(image, pad, mode="symmetric" if min(height, width) > 1 else "edge")
