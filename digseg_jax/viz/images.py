# SPDX-License-Identifier: Apache-2.0
"""Images of label maps: painted classes, overlays on the photo, a legend strip, PNG files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from digseg_jax.arraytypes import Float, Int, UInt8
from digseg_jax.errors import UserError
from digseg_jax.viz.colors import IGNORE_COLOR, class_colors, from_hex, to_hex
from digseg_jax.viz.fonts import fitting, shortened

BAND = 256  # rows

__all__ = [
    "IGNORE_COLOR", "class_colors", "from_hex", "legend", "overlay", "paint", "save_index",
    "save_label", "save_mask", "save_photo", "to_hex",
]  # fmt: skip


def _checked(label: Int[np.ndarray, "h w"], n: int) -> Int[np.ndarray, "h w"]:
    """Returns the label map; raises UserError unless it is [h, w] of integers in -1..n-1."""
    label = np.asarray(label)
    if label.ndim != 2 or label.dtype.kind not in "iu":
        raise UserError(
            f"label map has shape {label.shape} and type {label.dtype}; it must be integers [h, w]"
        )
    if label.size and (label.min() < -1 or label.max() >= n):
        raise UserError(
            f"label map holds {label.min()}..{label.max()}; legal are 0..{n - 1} and -1 (ignored)"
        )
    return label


def paint(
    label: Int[np.ndarray, "h w"], colors: UInt8[np.ndarray, "n 3"]
) -> UInt8[np.ndarray, "h w 3"]:
    """Paints a label map in class colors; -1 (ignored) is mid gray.

    Raises UserError for a label outside -1..n-1.
    """
    table = np.concatenate([np.asarray(colors, np.uint8).reshape(-1, 3), [IGNORE_COLOR]])
    return table.astype(np.uint8)[_checked(label, len(colors))]  # -1 picks the last row


def overlay(
    image: UInt8[np.ndarray, "h w 3"],
    label: Int[np.ndarray, "h w"],
    colors: UInt8[np.ndarray, "n 3"],
    alpha: float = 0.5,
) -> UInt8[np.ndarray, "h w 3"]:
    """Lays class colors over a photo; alpha in 0..1, ignored pixels stay as they are."""
    image = np.asarray(image)
    if image.shape != (*np.shape(label), 3):
        raise UserError(
            f"overlay: image shape {image.shape} does not fit the label map {np.shape(label)}"
        )
    label, painted = np.asarray(label), paint(label, colors)
    for rows in _bands(len(image)):
        share = np.where(label[rows] == -1, 0.0, alpha)[..., None]
        mixed = (1 - share) * image[rows] + share * painted[rows]
        painted[rows] = np.clip(np.rint(mixed), 0, 255)
    return painted


def _bands(height: int) -> Iterator[slice]:
    """Rows that are worked on at a time: float64 of a large image would take a gigabyte."""
    return (slice(top, top + BAND) for top in range(0, height, BAND))


def legend(
    names: Sequence[str],
    colors: UInt8[np.ndarray, "n 3"],
    width: int = 512,
    size: int = 13,
    numbers: Sequence[int] = (),
) -> UInt8[np.ndarray, "h width 3"]:
    """Draws a white strip of swatches and names, `width` pixels wide.

    Args:
      names: a name that is too long for the strip is cut.
      size: height of the text, pixels.
      numbers: of the names, by default from 0 on; stand for names whose letters no font here has.
    """
    row, gap = round(size * 1.7), round(size * 0.6)
    room = width - size - 3 * gap  # between a swatch at the left edge and the right edge

    # Where each entry begins; one that would pass the right edge opens a new row.
    entries, x, y = [], gap, gap
    for name, number in zip(names, numbers or range(len(names)), strict=True):
        text, font = fitting(name, number, size)
        text = shortened(text, font, room)
        step = size + gap + round(font.getlength(text)) + 2 * gap
        if x > gap and x + step > width:
            x, y = gap, y + row
        entries.append((x, y, text, font))
        x += step

    strip = Image.new("RGB", (width, y + row), "white")
    draw = ImageDraw.Draw(strip)
    for (x, y, text, font), color in zip(entries, colors, strict=True):
        box = (x, y, x + size, y + size)
        draw.rectangle(box, fill=tuple(int(c) for c in color), outline=(110, 110, 110))
        draw.text((x + size + gap, y + size / 2), text, fill=(30, 30, 30), font=font, anchor="lm")
    return np.asarray(strip)


def save_photo(path: Path, image: UInt8[np.ndarray, "h w 3"]) -> None:
    """Writes an RGB PNG."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(
            f"{path.name}: image has shape {image.shape} and type {image.dtype}; "
            "it must be uint8 [h, w, 3]"
        )
    Image.fromarray(image).save(path, optimize=True)


def save_label(path: Path, label: Int[np.ndarray, "h w"], colors: UInt8[np.ndarray, "n 3"]) -> None:
    """Writes a label map as a palette PNG (index = class, 255 = ignored); RGB if over 255."""
    label = _checked(label, len(colors))
    if len(colors) > 255:
        Image.fromarray(paint(label, colors)).save(path, optimize=True)
        return
    palette = np.full((256, 3), IGNORE_COLOR, np.uint8)
    palette[: len(colors)] = colors
    indices = Image.fromarray(np.where(label == -1, 255, label).astype(np.uint8))
    indices.putpalette(palette.tobytes())
    indices.save(path, optimize=True)


def save_index(path: Path, label: Int[np.ndarray, "h w"], colors: UInt8[np.ndarray, "n 3"]) -> None:
    """Writes a label map whose numbers are kept: as `save_label`, over 255 classes as 16 bits of gray.

    Of 16 bits, 65535 is ignored.
    """
    if len(colors) <= 255:
        save_label(path, label, colors)
        return
    label = _checked(label, min(len(colors), 65535))
    Image.fromarray(np.where(label == -1, 65535, label).astype(np.uint16)).save(path, optimize=True)


def save_mask(path: Path, mask: Float[np.ndarray, "h w"]) -> None:
    """Writes probabilities 0..1 as an 8-bit gray PNG; NaN is written as 0.

    Compressed lightly: `optimize` makes it a tenth smaller and takes many times as long, minutes for a
    vocabulary on a photograph of twelve megapixels.
    """
    Image.fromarray(gray_levels(mask)).save(path, compress_level=4)


def gray_levels(mask: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """Probabilities 0..1 as 0..255; NaN becomes 0."""
    mask = np.asarray(mask)
    gray = np.empty(mask.shape, np.uint8)
    for rows in _bands(len(mask)):
        share = np.clip(np.nan_to_num(np.asarray(mask[rows], np.float64)), 0, 1)
        gray[rows] = np.rint(share * 255)
    return gray
