# SPDX-License-Identifier: Apache-2.0
"""Training crops from images of any size: large-scale jitter, crop, flip, colors, padding.

A crop is cut out of the image first and then resized, so that the work does not grow with the jitter.
Image and label cover the same window to the pixel: output pixel u shows the source at
top + (u + 0.5) * extent / size, linear for the image, nearest for the label.
"""

from __future__ import annotations

import dataclasses
import math

import cv2
import numpy as np

Example = dict[str, np.ndarray]

IGNORE = -1
PADDING = 127  # gray, close to 0 after scaling to [-1, 1]
CAP_TRIES = 10  # windows drawn before one with too much of a class is accepted (as in mmsegmentation)
CAP_GRID = 64  # samples per side from which a window's class shares are estimated
LUMA = (0.299, 0.587, 0.114)  # weights of R, G, B in brightness (BT.601)


@dataclasses.dataclass(frozen=True)
class CropRules:
    """How crops are drawn; `config.DataConfig` gives the ranges.

    Attributes:
      size: side of a crop, pixels.
      scale_min, scale_max: range of the scale; at 1 the image's short side fills the crop, or, with
        `native`, a pixel of the crop is a pixel of the image.
      class_share_cap: windows with a larger share of one class are drawn again; 1 accepts all.
      flip: probability of a mirrored crop.
      quarter_turns: crops are also turned by 0, 90, 180 or 270 degrees.
      jitter: strength of color changes: 0 none, 1 the ranges of mmsegmentation's PhotoMetricDistortion.
    """

    size: int
    scale_min: float = 0.5
    scale_max: float = 2.0
    class_share_cap: float = 0.75
    flip: float = 0.5
    jitter: float = 0.5
    native: bool = False
    quarter_turns: bool = False


@dataclasses.dataclass(frozen=True)
class Window:
    """Source rows top..top+height and columns left..left+width, and their place in the crop."""

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
    """Draws a crop: image uint8 [h, w, 3] and label [h, w] to [s, s, 3] and [s, s], types unchanged."""
    window = balanced_window(label, rules, rng)
    image, label = view(image, label, window, rules.size)

    # In place: allocating another image costs more than the work on it.
    if rng.random() < rules.flip:
        image, label = cv2.flip(image, 1, dst=image), cv2.flip(label, 1, dst=label)
    if rules.quarter_turns:
        turns = int(rng.integers(4))
        image, label = (np.ascontiguousarray(np.rot90(x, turns)) for x in (image, label))
    if rules.jitter:
        image = cv2.transform(image, color_matrix(rules.jitter, rng), dst=image)
    return image, label


def draw_window(height: int, width: int, rules: CropRules, rng: np.random.Generator) -> Window:
    """Draws a window: its size log-uniformly, its position uniformly."""
    scale = math.exp(rng.uniform(math.log(rules.scale_min), math.log(rules.scale_max)))

    # A window larger than the image keeps all of it; the rest of the crop is padding.
    side = max(1, round((rules.size if rules.native else min(height, width)) / scale))
    top, rows, out_top, out_rows = _extent(height, side, rules.size, rng)
    left, columns, out_left, out_columns = _extent(width, side, rules.size, rng)
    return Window(top, left, rows, columns, out_top, out_left, out_rows, out_columns)


def central_window(height: int, width: int, size: int) -> Window:
    """The middle square of an image, its short side filling the crop: the window of cached latents."""
    side = min(height, width)
    return Window((height - side) // 2, (width - side) // 2, side, side, 0, 0, size, size)


def _extent(length: int, side: int, size: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draws start and extent along one axis: in the source, then in the crop."""
    extent = min(side, length)  # shorter than `side` where the image is
    out = max(1, round(size * extent / side))
    return int(rng.integers(length - extent + 1)), extent, int(rng.integers(size - out + 1)), out


def balanced_window(label: np.ndarray, rules: CropRules, rng: np.random.Generator) -> Window:
    """Draws up to CAP_TRIES windows until no class exceeds the cap of the labeled pixels."""
    height, width = label.shape
    for _ in range(CAP_TRIES):
        window = draw_window(height, width, rules, rng)
        if rules.class_share_cap >= 1 or _largest_share(label, window) <= rules.class_share_cap:
            break
    return window


def _largest_share(label: np.ndarray, window: Window) -> float:
    """Estimated share of the commonest class among a window's labeled pixels; 1 if there are none."""
    rows = slice(window.top, window.top + window.height, max(1, window.height // CAP_GRID))
    columns = slice(window.left, window.left + window.width, max(1, window.width // CAP_GRID))

    # Shifted by one: ignored pixels are the first bin, which is dropped.
    counts = np.bincount(label[rows, columns].ravel() - IGNORE)[1:]
    return counts.max() / counts.sum() if counts.any() else 1.0


def view(
    image: np.ndarray, label: np.ndarray, window: Window, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a window out and resizes it to a [size, size] crop; outside the image the label is -1.

    Args:
      image: uint8 [h, w, 3].
      label: signed integers [h, w], ignore = -1.
      window: which pixels, and where they lie in the crop.
      size: side of the crop, pixels.
    """
    rows = slice(window.top, window.top + window.height)
    columns = slice(window.left, window.left + window.width)
    shape = (window.out_width, window.out_height)

    # Average against aliasing where a pixel of the crop stands for more than two of the image.
    shrinks = window.height > 2 * window.out_height
    linear = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    image = cv2.resize(image[rows, columns], shape, interpolation=linear)
    label = cv2.resize(label[rows, columns], shape, interpolation=cv2.INTER_NEAREST_EXACT)

    # The image does not fill the crop: pad with gray, and with "ignore" in the label.
    if shape != (size, size):
        image = _placed(image, window, size, PADDING)
        label = _placed(label, window, size, IGNORE)
    return image, label


def _placed(value: np.ndarray, window: Window, size: int, fill: int) -> np.ndarray:
    """`value` at its place in a [size, size] array filled with `fill`."""
    out = np.full((size, size, *value.shape[2:]), fill, value.dtype)
    rows = slice(window.out_top, window.out_top + window.out_height)
    out[rows, window.out_left : window.out_left + window.out_width] = value
    return out


def color_matrix(strength: float, rng: np.random.Generator) -> np.ndarray:
    """Draws brightness, contrast, saturation and hue as one affine map of RGB: float64 [3, 4].

    At strength 1, each with probability 1/2: brightness +-32 of 255, contrast and saturation 0.5..1.5,
    hue +-36 degrees (about the gray axis).
    """
    used = rng.random(4) < 0.5  # brightness, contrast, saturation, hue
    draws = np.where(used, rng.uniform(-1, 1, 4), 0.0) * strength
    brightness, contrast, saturation, hue = draws.tolist()
    contrast, saturation = 1 + 0.5 * contrast, 1 + 0.5 * saturation

    # contrast * hue(saturation * color + (1 - saturation) * luma). The rotation about the gray axis
    # does not change grays such as luma, so luma's part is added after it.
    turned = _rotation(math.radians(36 * hue), contrast * saturation)
    luma = [contrast * (1 - saturation) * weight for weight in LUMA]

    # Contrast is taken about middle gray, 127.5.
    offset = 127.5 * (1 - contrast) + 32 * brightness
    return np.array([[t + g for t, g in zip(row, luma, strict=True)] + [offset] for row in turned])


def _rotation(angle: float, scale: float) -> list[list[float]]:
    """Rotation of colors about the gray axis by `angle` radians, times `scale`: 3 x 3."""
    third, sine = (1 - math.cos(angle)) / 3, math.sin(angle) / math.sqrt(3)

    # Rodrigues' formula for the axis (1, 1, 1) / sqrt(3): a circulant matrix.
    a, b, c = (scale * x for x in (math.cos(angle) + third, third - sine, third + sine))
    return [[a, b, c], [c, a, b], [b, c, a]]
