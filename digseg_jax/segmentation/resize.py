# SPDX-License-Identifier: Apache-2.0
"""Resizes images and probabilities; labels of a prediction are never resized."""

from __future__ import annotations

import cv2
import numpy as np

from digseg_jax.arraytypes import Float, UInt8


def resize_probability(
    probability: Float[np.ndarray, "q h w"], height: int, width: int
) -> Float[np.ndarray, "q h2 w2"]:
    """Resizes bilinearly, as torch's `interpolate` with align_corners=False does; float32."""
    if probability.shape[1:] == (height, width):
        return np.asarray(probability, np.float32)
    planes = [
        cv2.resize(np.asarray(p, np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
        for p in probability
    ]
    return np.stack(planes) if planes else np.zeros((0, height, width), np.float32)


def resize_image(image: UInt8[np.ndarray, "h w 3"], height: int, width: int) -> np.ndarray:
    """Shrinks by area averages or enlarges bilinearly; uint8 [height, width, 3]."""
    if image.shape[:2] == (height, width):
        return image
    shrinking = height * width < image.shape[0] * image.shape[1]
    how = cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=how)


def to_short_side(image: UInt8[np.ndarray, "h w 3"], side: int) -> np.ndarray:
    """Resizes so that the short side has `side` pixels, proportions kept; uint8 [h2, w2, 3]."""
    return resize_image(image, *scaled_shape(image.shape[:2], side))


def scaled_shape(shape: tuple[int, int], side: int) -> tuple[int, int]:
    """Height and width of an image whose short side is brought to `side` pixels."""
    scale = side / min(shape)
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))
