# SPDX-License-Identifier: Apache-2.0
"""What a calibration is fitted to: mask scores of evenly chosen pixels, within a bound on their size.

The scores of all pixels of a large split would take tens of gigabytes on every process. A scale and one
bias a class need few of them, so the choice is made before any image is segmented: pixels on a grid of
each image, coarser where the images are many, and fewer images where a vocabulary is large.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np

from digseg_jax.evaluation.examples import EvalExamples
from digseg_jax.prediction.answer import Answer
from digseg_jax.segmentation.codec import Codec

EVIDENCE = 2**29  # bytes of all scores and labels; every process holds all of them at the end
STRIDE = 4  # least distance of two pixels, in both axes
LEAST = 256  # pixels of an image, before images are left out


def choose(examples: EvalExamples, classes: int, members: int) -> tuple[EvalExamples, int]:
    """Chooses what a calibration is fitted to, from numbers that all processes know.

    Args:
      examples: the images that may be used.
      classes: queries of each image.
      members: scores of a pixel for each query.

    Returns:
      The images, evenly spread, and the most pixels that `few_pixels` may take of each.
    """
    # float32 scores and an int32 label.
    room = max(EVIDENCE // (4 * (classes * members + 1)), 1)
    images = min(len(examples), max(room // LEAST, 1))
    return examples.evenly(images), room // max(images, 1)


def same_competition(examples: EvalExamples, codec: Codec, exhaustive_limit: int) -> bool:
    """Whether the classes compete in a calibration as they do in a prediction.

    They do not where a prediction asks for some of them, as there are more than one mask image shows;
    nor where a class that is never asked for takes the pixels that no other one claims.
    """
    whole = not codec.exclusive or codec.asks_for_all(len(examples.classes), exhaustive_limit)
    return whole and (examples.rest < 0 or codec.closed)


def few_pixels(label: np.ndarray, answer: Answer, most: int) -> dict[str, np.ndarray]:
    """Mask scores [pixels, q, e] and labels [pixels] on an even grid of at most `most` pixels."""
    height, width = label.shape
    stride = STRIDE
    while -(-height // stride) * -(-width // stride) > max(most, 1):
        stride += 1
    grid = slice(None, None, stride)
    planes = [answer.evidence(q)[:, grid, grid] for q in range(answer.num_queries)]
    evidence = np.stack([p.reshape(len(p), -1) for p in planes])
    return {"evidence": np.moveaxis(evidence, -1, 0), "label": label[grid, grid].ravel()}


def encoded(arrays: dict[str, np.ndarray]) -> str:
    """Arrays as base64 text, bit for bit."""
    data = io.BytesIO()
    np.savez(data, **arrays)  # type: ignore[arg-type]  # no array is named as an option
    return base64.b64encode(data.getvalue()).decode("ascii")


def joined(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mask scores and labels of all texts of `encoded`, in their order."""
    tables = []
    for text in texts:
        with np.load(io.BytesIO(base64.b64decode(text))) as stored:
            tables.append((stored["evidence"], stored["label"]))
    evidence, label = (np.concatenate(part) for part in zip(*tables, strict=True))
    return evidence, label
