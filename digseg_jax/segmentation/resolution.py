# SPDX-License-Identifier: Apache-2.0
"""Between picture sizes: probabilities are resized, labels of a prediction never are."""

from __future__ import annotations

import cv2
import numpy as np

from digseg_jax.arraytypes import Float, Int, UInt8

A847_SHORT_SIDE = 512


def resize_probability(
    probability: Float[np.ndarray, "q h w"], height: int, width: int
) -> Float[np.ndarray, "q h2 w2"]:
    """Bilinear with half-pixel centres, as torch's interpolate with align_corners=False; float32."""
    if probability.shape[1:] == (height, width):
        return np.asarray(probability, np.float32)
    planes = [
        cv2.resize(np.asarray(p, np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
        for p in probability
    ]
    return np.stack(planes) if planes else np.zeros((0, height, width), np.float32)


def resize_image(image: UInt8[np.ndarray, "h w 3"], height: int, width: int) -> np.ndarray:
    """Area average when shrinking, bilinear when enlarging; uint8 [height, width, 3]."""
    if image.shape[:2] == (height, width):
        return image
    shrinking = height * width < image.shape[0] * image.shape[1]
    how = cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=how)


def a847_size(height: int, width: int, short_side: int = A847_SHORT_SIDE) -> tuple[int, int]:
    """The size at which ADE20K-847 is scored: short side at most 512, the other in proportion.

    MaskFormer's preparation script; the published numbers are at this size, not at the files' own.
    """
    short, long = min(height, width), max(height, width)
    if short <= short_side:
        return height, width
    other = round(long / short * short_side)
    return (short_side, other) if height < width else (other, short_side)


def a847_label(label: Int[np.ndarray, "h w"]) -> Int[np.ndarray, "h2 w2"]:
    """A label map at `a847_size`, nearest neighbour; int32."""
    height, width = a847_size(*label.shape)
    if (height, width) == label.shape:
        return np.asarray(label, np.int32)
    resized = cv2.resize(
        label.astype(np.float64), (width, height), interpolation=cv2.INTER_NEAREST
    )  # 64-bit: class ids up to 65535 stay exact
    return resized.astype(np.int32)
