# SPDX-License-Identifier: Apache-2.0
"""Scale and biases that turn a decoded mask into a probability, fitted on a split of their own."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from digseg_jax.segmentation.metrics import mean_iou

SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BIAS_STEPS = (-1.0, -0.5, -0.25, -0.1, 0.1, 0.25, 0.5, 1.0)
MAX_BIAS = 4.0
SWEEPS = 3


@dataclasses.dataclass(frozen=True)
class Calibration:
    """p = sigmoid(scale * evidence + bias of the class); `split` says what it was fitted on."""

    scale: float
    bias: tuple[float, ...]
    split: str

    def to_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "bias": list(self.bias), "split": self.split}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Calibration:
        return cls(values["scale"], tuple(values["bias"]), values["split"])


def identity(num_classes: int, scale: float = 2.0) -> Calibration:
    """No fitting: the given scale, no bias."""
    return Calibration(scale, (0.0,) * num_classes, "none")


def fit(evidence: np.ndarray, label: np.ndarray, split: str, scale: float | None = None) -> Calibration:
    """Scale by cross-entropy of the single masks; biases by mIoU of the argmax, class by class.

    Args:
      evidence: float [pixels, classes] or, of an ensemble, [pixels, classes, members], in [-1, 1].
        Members are combined as an evaluation combines them: the mean of their probabilities.
      label: int [pixels], -1 is ignored.
      scale: known already (a palette's follows from its autoencoder, and its members' probabilities
        are those of a softmax); only biases are fitted.
    """
    evidence, label = evidence[label >= 0].astype(np.float32), label[label >= 0]
    evidence = evidence.reshape(*evidence.shape[:2], -1)
    true = np.eye(evidence.shape[1], dtype=np.float32)[label]
    probabilities = _sigmoid if scale is None else _softmax
    if scale is None:
        scale = min(SCALES, key=lambda s: _cross_entropy(s * evidence, true[..., None]))
    logits = scale * evidence

    def score(bias: np.ndarray) -> float:
        biased = logits + bias[:, None]
        # one member's argmax needs no probabilities
        one = biased.shape[2] == 1
        return _argmax_miou(biased[..., 0] if one else probabilities(biased).mean(axis=2), label)

    bias = np.zeros(evidence.shape[1], np.float32)
    best = score(bias)
    for _ in range(SWEEPS):
        before = best
        for c in range(len(bias)):
            for delta in BIAS_STEPS:
                trial = bias.copy()
                trial[c] = np.clip(trial[c] + delta, -MAX_BIAS, MAX_BIAS)
                found = score(trial)
                if found > best + 1e-5:
                    best, bias = found, trial
        if best == before:
            break
    return Calibration(scale, tuple(float(b) for b in bias), split)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Over the classes, axis 1."""
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def _cross_entropy(logits: np.ndarray, true: np.ndarray) -> float:
    return float((np.logaddexp(0.0, logits) - true * logits).mean())


def _argmax_miou(values: np.ndarray, label: np.ndarray) -> float:
    n = values.shape[1]
    cells = label * (n + 1) + values.argmax(axis=1)
    return mean_iou(np.bincount(cells, minlength=n * (n + 1)).reshape(n, n + 1))
