# SPDX-License-Identifier: Apache-2.0
"""Training crops of pictures of any size: large-scale jitter, crop, flip, colours, padding.

A crop is cut out of the picture first and then brought to its size, so that the work does not grow
with the jitter. Picture and label cover the same window to the pixel: output pixel u shows the source
at top + (u + 0.5) * extent / size, linear for the picture, nearest for the label.
"""

from __future__ import annotations

import dataclasses
import math

import cv2
import numpy as np

Example = dict[str, np.ndarray]


IGNORE = -1
PADDING = 127  # grey, close to 0 after scaling to [-1, 1]
CAP_TRIES = 10  # draws of a window before one of too much of a class is taken (mmsegmentation's)
CAP_GRID = 64  # samples a side that the class shares of a window are estimated from
LUMA = (0.299, 0.587, 0.114)


@dataclasses.dataclass(frozen=True)
class CropRules:
    """How crops are drawn; the ranges are those of `config.DataConfig`.

    scale_min, scale_max: at 1 the picture's short side fills the crop.
    class_share_cap: windows with more of one class are drawn again; 1 takes all.
    flip: probability of a mirrored crop. jitter: 0 none, 1 the ranges of mmsegmentation's
    PhotoMetricDistortion.
    """

    size: int
    scale_min: float = 0.5
    scale_max: float = 2.0
    class_share_cap: float = 0.75
    flip: float = 0.5
    jitter: float = 0.5


@dataclasses.dataclass(frozen=True)
class Window:
    """Source rows top..top+height and columns left..left+width, and where they go in the crop."""

    top: int
    left: int
    height: int
    width: int
    out_top: int
    out_left: int
    out_height: int
    out_width: int


def random_view(
    image: np.ndarray, label: np.ndarray, rules: CropRules, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Picture uint8 [h, w, 3] and label [h, w] to a crop: [s, s, 3] and [s, s], of the same types."""
    window = balanced_window(label, rules, rng)
    image, label = view(image, label, window, rules.size)
    # in place: memory for another picture costs more than the work on it
    if rng.random() < rules.flip:
        image, label = cv2.flip(image, 1, dst=image), cv2.flip(label, 1, dst=label)
    if rules.jitter:
        image = cv2.transform(image, colour_matrix(rules.jitter, rng), dst=image)
    return image, label


def draw_window(height: int, width: int, rules: CropRules, rng: np.random.Generator) -> Window:
    """A window of a size drawn log-uniformly and a position drawn uniformly."""
    scale = math.exp(rng.uniform(math.log(rules.scale_min), math.log(rules.scale_max)))
    side = max(1, round(min(height, width) / scale))
    top, rows, out_top, out_rows = _extent(height, side, rules.size, rng)
    left, columns, out_left, out_columns = _extent(width, side, rules.size, rng)
    return Window(top, left, rows, columns, out_top, out_left, out_rows, out_columns)


def central_window(height: int, width: int, size: int) -> Window:
    """The middle square of a picture, its short side filling the crop: what cached latents show."""
    side = min(height, width)
    return Window((height - side) // 2, (width - side) // 2, side, side, 0, 0, size, size)


def _extent(length: int, side: int, size: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Along one axis: start and extent in the source, then in the crop."""
    extent = min(side, length)
    out = max(1, round(size * extent / side))
    return int(rng.integers(length - extent + 1)), extent, int(rng.integers(size - out + 1)), out


def balanced_window(label: np.ndarray, rules: CropRules, rng: np.random.Generator) -> Window:
    """The first window (of CAP_TRIES) in which no class has more than its cap of labelled pixels."""
    height, width = label.shape
    for _ in range(CAP_TRIES):
        window = draw_window(height, width, rules, rng)
        if rules.class_share_cap >= 1 or _largest_share(label, window) <= rules.class_share_cap:
            break
    return window


def _largest_share(label: np.ndarray, window: Window) -> float:
    rows = slice(window.top, window.top + window.height, max(1, window.height // CAP_GRID))
    columns = slice(window.left, window.left + window.width, max(1, window.width // CAP_GRID))
    counts = np.bincount(label[rows, columns].ravel() - IGNORE)[1:]
    return counts.max() / counts.sum() if counts.any() else 1.0


def view(
    image: np.ndarray, label: np.ndarray, window: Window, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The window brought to a [size, size] crop; what lies outside the picture is ignored."""
    rows = slice(window.top, window.top + window.height)
    columns = slice(window.left, window.left + window.width)
    shape = (window.out_width, window.out_height)
    # averaging against aliasing where a pixel of the crop stands for more than two of the picture
    shrinks = window.height > 2 * window.out_height
    linear = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    image = cv2.resize(image[rows, columns], shape, interpolation=linear)
    label = cv2.resize(label[rows, columns], shape, interpolation=cv2.INTER_NEAREST_EXACT)
    if shape != (size, size):
        image = _placed(image, window, size, PADDING)
        label = _placed(label, window, size, IGNORE)
    return image, label


def _placed(value: np.ndarray, window: Window, size: int, fill: int) -> np.ndarray:
    out = np.full((size, size, *value.shape[2:]), fill, value.dtype)
    rows = slice(window.out_top, window.out_top + window.out_height)
    out[rows, window.out_left : window.out_left + window.out_width] = value
    return out


def colour_matrix(strength: float, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue as one affine map of RGB: float64 [3, 4].

    At strength 1, each with probability 1/2: brightness +-32 of 255, contrast and saturation
    0.5..1.5, hue +-36 degrees (about the grey axis).
    """
    used = rng.random(4) < 0.5
    draws = np.where(used, rng.uniform(-1, 1, 4), 0.0) * strength
    brightness, contrast, saturation, hue = draws.tolist()
    contrast, saturation = 1 + 0.5 * contrast, 1 + 0.5 * saturation
    # hue(saturation * colour + (1 - saturation) * luma): a rotation leaves greys, such as luma, alone
    turned = _rotation(math.radians(36 * hue), contrast * saturation)
    luma = [contrast * (1 - saturation) * weight for weight in LUMA]
    offset = 127.5 * (1 - contrast) + 32 * brightness
    return np.array([[t + g for t, g in zip(row, luma, strict=True)] + [offset] for row in turned])


def _rotation(angle: float, scale: float) -> list[list[float]]:
    """Rotation of colours about the grey axis, times `scale`: 3 x 3."""
    third, sine = (1 - math.cos(angle)) / 3, math.sin(angle) / math.sqrt(3)
    a, b, c = (scale * x for x in (math.cos(angle) + third, third - sine, third + sine))
    return [[a, b, c], [c, a, b], [b, c, a]]


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
