# SPDX-License-Identifier: Apache-2.0
"""An image of answers for the eye: a scene a row, then each name with its mask on the scene."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 144  # pixels of one image
_LINE, _GAP = 16, 6
_MASK, _TRUTH = (255, 0, 80), (255, 255, 0)


class Answered(NamedTuple):
    """image: uint8 [h, w, 3]. answers: bool [names, h, w]; objects: bool [k, h, w], of the first k."""

    title: str
    image: np.ndarray
    names: Sequence[str]
    answers: np.ndarray
    objects: np.ndarray


def sheet(scenes: Sequence[Answered]) -> Image.Image:
    """Masks in red; the outline of the object that was meant in yellow."""
    columns = 1 + max(len(s.names) for s in scenes)
    size = (columns * (SIDE + _GAP), len(scenes) * (SIDE + _LINE + _GAP))
    page = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for row, scene in enumerate(scenes):
        top = row * (SIDE + _LINE + _GAP)
        cells = [(scene.title, _enlarged(scene.image))]
        for i, name in enumerate(scene.names):
            truth = scene.objects[i] if i < len(scene.objects) else None
            cells.append((name, _answer(scene.image, scene.answers[i], truth)))
        for column, (text, shown) in enumerate(cells):
            left = column * (SIDE + _GAP)
            draw.text((left, top + 1), text[:24], fill="black", font=font)
            page.paste(Image.fromarray(shown), (left, top + _LINE))
    return page


def _answer(image: np.ndarray, mask: np.ndarray, truth: np.ndarray | None) -> np.ndarray:
    tinted = _enlarged(image)
    inside = _enlarged(mask.astype(np.uint8)).astype(bool)
    tinted[inside] = (0.5 * tinted[inside] + 0.5 * np.array(_MASK)).astype(np.uint8)
    if truth is not None:
        filled = _enlarged(truth.astype(np.uint8))
        lines, _ = cv2.findContours(filled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(tinted, lines, -1, _TRUTH, 1)
    return tinted


def _enlarged(values: np.ndarray) -> np.ndarray:
    return cv2.resize(values, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
