# SPDX-License-Identifier: Apache-2.0
"""How the benchmarks of the domains score a predictor of label maps: as --suite=domains scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np

from digseg_jax.data.datasets.domains import DOMAINS, Domain
from digseg_jax.errors import UserError
from digseg_jax.evaluation.examples import EvalExamples
from digseg_jax.metrics import confusion


def chosen_domains(only: Sequence[str]) -> list[Domain]:
    """Domains by name, in this order; () for all.

    Raises:
      UserError: an unknown name.
    """
    known = {domain.name: domain for domain in DOMAINS}
    if wrong := [name for name in only if name not in known]:
        raise UserError(f"--only: no domain {', '.join(wrong)}; legal: {', '.join(known)}")
    return [known[name] for name in only or known]


def scaled(image: np.ndarray, label: np.ndarray, short_side: int) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 [h, w, 3] and label int [h, w] at the scale at which the generalist sees a domain."""
    scale = short_side / min(label.shape)
    size = tuple(max(1, round(side * scale)) for side in label.shape[::-1])
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    smaller = cv2.resize(label.astype(np.int16), size, interpolation=cv2.INTER_NEAREST)
    return cv2.resize(image, size, interpolation=way), smaller.astype(np.int32)


def score(
    examples: EvalExamples, short_side: int, predict: Callable[[np.ndarray], np.ndarray]
) -> dict[str, Any]:
    """Mean IoU of the classes that are asked for and occur, at the labels' own size.

    Args:
      examples: what is scored.
      short_side: pixels of an image's short side when it is seen.
      predict: from image uint8 [h, w, 3] to class ids [h, w].
    """
    classes = len(examples.classes)
    counts = np.zeros((classes, classes + 1), np.int64)
    for i in range(len(examples)):
        image, label = examples[i]["image"], examples[i]["label"]
        predicted = predict(scaled(image, label, short_side)[0]).astype(np.uint8)
        size = label.shape[::-1]
        full = cv2.resize(predicted, size, interpolation=cv2.INTER_NEAREST)
        counts += confusion.confusion(label, full.astype(np.int32), classes)
    occurring = [c for c in examples.asked if counts[c].sum()]
    iou = confusion.iou_per_class(counts)
    return {
        "asked_miou": float(iou[occurring].mean()),
        "images": len(examples),
        "split": examples.split,
        "per_class": {examples.classes[c]: float(iou[c]) for c in occurring},
    }


def mean_row(rows: dict[str, Any]) -> float:
    """Mean of the scored rows; NaN if there are none."""
    found = [row["asked_miou"] for row in rows.values() if "asked_miou" in row]
    return float(np.mean(found)) if found else math.nan
