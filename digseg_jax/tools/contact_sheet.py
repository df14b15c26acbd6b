# SPDX-License-Identifier: Apache-2.0
"""Contact sheet of a data set: images, their labels in color, and the classes of the colors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from digseg_jax.data.datasets.spec import DatasetSpec
from digseg_jax.viz.colors import IGNORE_COLOR, class_colors

WIDTH = 300  # width of an image or a label, pixels
COLUMNS = 2  # examples per row; each is an image and its label
_PER_IMAGE = 10  # class names under an example
_LINE, _GAP = 16, 8  # height of a line of text, distance between examples, pixels


class Tile(NamedTuple):
    """An example to show: image uint8 [h, w, 3], label int32 [h, w], and its title."""

    image: np.ndarray
    label: np.ndarray
    title: str


def palette(spec: DatasetSpec) -> np.ndarray:
    """Colors of the classes: uint8 [classes + 1, 3], the last row for ignored pixels (-1)."""
    colors = class_colors(spec.num_classes, spec.names, spec.colors)
    return np.concatenate([colors, np.array([IGNORE_COLOR], np.uint8)])


def contact_sheet(spec: DatasetSpec, tiles: Sequence[Tile]) -> Image.Image:
    """Draws rows of examples: image, colored label, and the names of the largest classes in it."""
    colors = palette(spec)
    cells = [_cell(spec, colors, tile) for tile in tiles]
    rows = [cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)]

    # A row is as high as its highest example.
    heights = [max(c.height for c in row) for row in rows]
    width = COLUMNS * (2 * WIDTH + 2 * _GAP)
    sheet = Image.new("RGB", (width, sum(heights) + _GAP * len(rows)), "white")

    top = 0
    for row, height in zip(rows, heights, strict=True):
        for i, cell in enumerate(row):
            sheet.paste(cell, (i * (2 * WIDTH + 2 * _GAP), top))
        top += height + _GAP
    return sheet


def _cell(spec: DatasetSpec, colors: np.ndarray, tile: Tile) -> Image.Image:
    """Draws one example: title, image beside label, and a legend of the largest classes."""
    # Fit to the width; very high images are squeezed to three times the width.
    height = max(1, round(tile.image.shape[0] * WIDTH / tile.image.shape[1]))
    size = (WIDTH, min(height, 3 * WIDTH))
    image = cv2.resize(tile.image, size, interpolation=cv2.INTER_AREA)
    label = cv2.resize(tile.label, size, interpolation=cv2.INTER_NEAREST)

    # Shares of all pixels of the label at its full size; ignored ones (-1) go to the last place.
    shares = np.bincount(tile.label.ravel() + 1, minlength=len(colors)) / tile.label.size
    shares = np.roll(shares, -1)
    present = [int(c) for c in np.argsort(-shares) if shares[c] > 0][:_PER_IMAGE]

    # Two names of the legend per line.
    lines = (len(present) + 1) // 2
    cell = Image.new("RGB", (2 * WIDTH + _GAP, _LINE + size[1] + _LINE * lines), "white")
    cell.paste(Image.fromarray(image), (0, _LINE))
    cell.paste(Image.fromarray(colors[label]), (WIDTH, _LINE))  # -1 indexes the last row

    # A box in the class's color, then its name and share.
    draw, font = ImageDraw.Draw(cell), ImageFont.load_default(11)
    draw.text((2, 1), tile.title, fill="black", font=font)
    for i, class_id in enumerate(present):
        left, top = (i % 2) * WIDTH, _LINE + size[1] + (i // 2) * _LINE
        box = (left + 2, top + 3, left + 14, top + 13)
        draw.rectangle(box, fill=tuple(colors[class_id].tolist()), outline="black")
        name = spec.names[class_id] if class_id < spec.num_classes else "ignored"
        draw.text((left + 19, top + 1), f"{name}  {shares[class_id]:.1%}", fill="black", font=font)
    return cell
