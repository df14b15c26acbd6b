# SPDX-License-Identifier: Apache-2.0
"""Cuts images of any size into views of one size, and joins the views' masks to masks of the image.

All views have the size that the network is evaluated at, so no image needs another compiled program.
Masks come back to the image's own resolution as probabilities, never as labels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from digseg_jax.arraytypes import Float, UInt8
from digseg_jax.segmentation.resize import resize_image, resize_probability, scaled_shape, to_short_side

MODES = ("window", "whole", "aspect")
OVERLAP = 0.25  # of a window's side, at least

Planes = Sequence[Float[np.ndarray, "h w"]] | Float[np.ndarray, "k h w"]  # a mask, view by view


@dataclasses.dataclass(frozen=True)
class Views:
    """The views of one image, and the way back.

    crops: the k views.
    assemble: joins k planes [h, w], one of each view, to a plane of the image's size.
    """

    crops: UInt8[np.ndarray, "k h w 3"]
    assemble: Callable[[Planes], Float[np.ndarray, "h2 w2"]]


def make_views(
    image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int], mode: str, short_side: int = 0
) -> Views:
    """Cuts an image into views of `size` (height, width).

    Args:
      image: of any size.
      size: of every view.
      mode: one of `MODES`. whole: the image is squeezed into one view. aspect: it is scaled to fit into
        one view, and the rest is mirrored padding that is cut off again. window: overlapping views of
        the image, whose planes are blended with weights that fall towards the borders.
      short_side: window: pixels that the image's short side is scaled to; 0: it keeps its resolution.

    Raises:
      ValueError: another mode, or an image without pixels.
    """
    if mode not in MODES:
        raise ValueError(f"inference {mode!r}; legal: {', '.join(MODES)}")
    if image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"image has shape {image.shape}; expected [h, w, 3] with some pixels")
    if mode == "window" and short_side:
        views, shape = _windows(to_short_side(image, short_side), size), image.shape[:2]
        return Views(views.crops, lambda planes: _resized(views.assemble(planes), *shape))
    return {"whole": _whole, "aspect": _aspect, "window": _windows}[mode](image, size)


def _whole(image: np.ndarray, size: tuple[int, int]) -> Views:
    """Squeezes the image into one view."""
    crops = resize_image(image, *size)[None]
    return Views(crops, lambda planes: _resized(planes[0], *image.shape[:2]))


def _aspect(image: np.ndarray, size: tuple[int, int]) -> Views:
    """Scales the image to fit into one view, and pads it."""
    height, width = image.shape[:2]
    scale = min(size[0] / height, size[1] / width)
    h = max(1, min(size[0], round(height * scale)))
    w = max(1, min(size[1], round(width * scale)))
    crops = _pad(resize_image(image, h, w), size)[None]
    return Views(crops, lambda planes: _resized(planes[0][:h, :w], height, width))


def _windows(image: np.ndarray, size: tuple[int, int]) -> Views:
    """Cuts the image into overlapping windows; a small image is padded to one."""
    height, width = image.shape[:2]
    padded = _pad(image, size)
    rows, columns = (starts(n, s) for n, s in zip(padded.shape[:2], size, strict=True))
    corners = [(top, left) for top in rows for left in columns]
    places = [(slice(t, t + size[0]), slice(le, le + size[1])) for t, le in corners]
    crops = np.stack([padded[place] for place in places])
    if len(places) == 1:
        return Views(crops, lambda planes: np.asarray(planes[0][:height, :width], np.float32))

    # Sum of the windows' weights at each pixel, by which a blended plane is divided.
    weight = window_weight(size)
    weights = np.zeros(padded.shape[:2], np.float64)
    for place in places:
        weights[place] += weight

    def assemble(planes: Planes) -> np.ndarray:
        total = np.zeros(padded.shape[:2], np.float64)
        for place, plane in zip(places, planes, strict=True):
            total[place] += plane * weight
        return (total / weights)[:height, :width].astype(np.float32)

    return Views(crops, assemble)


def count_views(shape: tuple[int, int], size: tuple[int, int], mode: str, short_side: int = 0) -> int:
    """The number of views that `make_views` cuts an image of `shape` (height, width) into."""
    if mode != "window":
        return 1
    if short_side:
        shape = scaled_shape(shape, short_side)
    return math.prod(len(starts(max(n, s), s)) for n, s in zip(shape, size, strict=True))


def starts(length: int, size: int) -> list[int]:
    """Window starts that cover `length` evenly, at most three quarters of a window apart."""
    count = 1 + int(np.ceil(max(length - size, 0) / ((1 - OVERLAP) * size)))
    return [int(s) for s in np.linspace(0, length - size, count).round()]


def window_weight(size: tuple[int, int]) -> Float[np.ndarray, "h w"]:
    """Weights of a window's pixels: highest in the middle, small but positive at the border."""
    ramps = (np.minimum(np.arange(1, n + 1), np.arange(n, 0, -1)) / (n / 2) for n in size)
    return np.clip(np.outer(*ramps), 1e-3, None)


def _resized(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes one plane of probabilities."""
    return resize_probability(plane[None], height, width)[0]


def _pad(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pads an image below and on the right to at least `size`, with its mirror image."""
    height, width = image.shape[:2]
    pad = [(0, max(size[0] - height, 0)), (0, max(size[1] - width, 0)), (0, 0)]
    return np.pad(image, pad, mode="symmetric" if min(height, width) > 1 else "edge")
