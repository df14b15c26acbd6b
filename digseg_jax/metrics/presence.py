# SPDX-License-Identifier: Apache-2.0
"""Gates a large vocabulary: which classes are worth full sampling, and how many the gate loses.

Every class gets a presence score for an image; the best K above a cut survive, and only they are
denoised in full. This module only computes on arrays; `digseg_jax.evaluation` runs the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from digseg_jax.arraytypes import Float, Int

PROTOCOLS = ("oracle", "gated", "exhaustive")
TOP_SHARE = 0.01  # share of an image's pixels, the most certain ones, whose mean is the score


def presence(probability: Float[np.ndarray, "q h w"]) -> Float[np.ndarray, "q"]:
    """Presence score of each soft mask: the mean of its highest percent of pixels, in 0..1."""
    # A small object fills few pixels, so the mean over the image would hide it. `partition` finds the
    # largest values without sorting all of them.
    flat = probability.reshape(len(probability), -1)
    count = max(1, int(TOP_SHARE * flat.shape[1]))
    return np.partition(flat, flat.shape[1] - count, axis=1)[:, -count:].mean(axis=1)


def survivors(scores: Float[np.ndarray, "q"], limit: int, cut: float) -> Int[np.ndarray, "k"]:
    """Selects the `limit` best classes with a score of `cut` or more, in class order; at least one."""
    # Stable, so that equal scores keep the order of the classes on every machine.
    best = np.argsort(-scores, kind="stable")[:limit]
    kept = best[scores[best] >= cut]
    return np.sort(kept if len(kept) else best[:1])


def label_map(
    probability: Float[np.ndarray, "k h w"], classes: Int[np.ndarray, "k"]
) -> Int[np.ndarray, "h w"]:
    """Labels each pixel with its most probable queried class, as an index of the vocabulary."""
    return np.asarray(classes)[probability.argmax(axis=0)].astype(np.int32)


def gate_recall(
    scores: Float[np.ndarray, "n q"], areas: Int[np.ndarray, "n q"], limits: Sequence[int]
) -> dict[int, dict[str, float]]:
    """Measures, for each K of `limits`, what the K best-scored classes of an image cover.

    Args:
      scores: presence scores, one per image and class.
      areas: true pixels, one count per image and class.
      limits: the values of K.

    Returns:
      {K: {"pixels": share of the labeled pixels, "classes": share of the present classes}}, pooled over
      images; nan where nothing is labeled.
    """
    # Areas of each image's classes, the best-scored first.
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(np.asarray(areas, np.int64), order, axis=1)
    pixels, present = max(ranked.sum(), 0), (ranked > 0).sum()

    table = {}
    for k in limits:
        top = ranked[:, :k]
        table[int(k)] = {
            "pixels": float(top.sum() / pixels) if pixels else float("nan"),
            "classes": float((top > 0).sum() / present) if present else float("nan"),
        }
    return table


def recall_limits(num_classes: int) -> tuple[int, ...]:
    """Limits for `gate_recall`: 1, 2, 4, ... up to 1024, and the whole vocabulary."""
    powers = [2**i for i in range(11) if 2**i < num_classes]
    return (*powers, num_classes)
