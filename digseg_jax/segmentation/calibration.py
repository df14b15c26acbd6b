# SPDX-License-Identifier: Apache-2.0
"""Scale and biases that turn a decoded mask into a probability, fitted on a split of their own."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from digseg_jax.metrics.confusion import mean_iou

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


def fit(
    evidence: np.ndarray,
    label: np.ndarray,
    split: str,
    scale: float | None = None,
    *,
    exclusive: bool = False,
) -> Calibration:
    """Scale by cross-entropy of the members' masks; biases by mIoU of the argmax, class by class.

    Args:
      evidence: float [pixels, classes] or, of an ensemble, [pixels, classes, members], in [-1, 1].
        Members are combined as an evaluation combines them by default: the mean of their
        probabilities.
      label: int [pixels], -1 is ignored.
      scale: known already (a palette's follows from its autoencoder); only biases are fitted.
      exclusive: a member's probabilities are those of a softmax over the classes, not each class's own
        (`Codec.exclusive`).
    """
    evidence, label = evidence[label >= 0].astype(np.float32), label[label >= 0]
    members = np.ascontiguousarray(np.moveaxis(evidence.reshape(*evidence.shape[:2], -1), 1, 0))
    if scale is None:
        true = np.eye(len(members), dtype=np.float32)[label].T[..., None]
        scale = min(SCALES, key=lambda s: _cross_entropy(s * members, true, softmax=exclusive))
    logits = scale * members  # [classes, pixels, members]
    bias = np.zeros(len(members), np.float32)
    values = _values(logits, bias, softmax=exclusive)
    best = _argmax_miou(values, label)
    for _ in range(SWEEPS):
        before = best
        for c in range(len(bias)):
            for delta in BIAS_STEPS:
                trial = bias.copy()
                trial[c] = np.clip(trial[c] + delta, -MAX_BIAS, MAX_BIAS)
                tried = _rebiased(values, logits, trial, c, softmax=exclusive)
                found = _argmax_miou(tried, label)
                if found > best + 1e-5:
                    best, bias, values = found, trial, tried
        if best == before:
            break
    return Calibration(scale, tuple(float(b) for b in bias), split)


def _values(logits: np.ndarray, bias: np.ndarray, *, softmax: bool) -> np.ndarray:
    """What the argmax goes over, [classes, pixels], of [classes, pixels, members]."""
    biased = logits + bias[:, None, None]
    if biased.shape[2] == 1:  # one member's argmax needs no probabilities
        return biased[..., 0]
    return (_softmax(biased) if softmax else _sigmoid(biased)).mean(axis=2)


def _rebiased(
    values: np.ndarray, logits: np.ndarray, bias: np.ndarray, c: int, *, softmax: bool
) -> np.ndarray:
    """`_values` where only the bias of class c has changed since `values`."""
    if softmax and logits.shape[2] > 1:  # its classes share a denominator
        return _values(logits, bias, softmax=True)
    values = values.copy()
    values[c] = _values(logits[c : c + 1], bias[c : c + 1], softmax=softmax)[0]
    return values


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Over the classes, axis 0."""
    weights = np.exp(logits - logits.max(axis=0))
    return weights / weights.sum(axis=0)


def _cross_entropy(logits: np.ndarray, true: np.ndarray, *, softmax: bool) -> float:
    if softmax:
        return float(-np.log(np.maximum((true * _softmax(logits)).sum(axis=0), 1e-12)).mean())
    return float((np.logaddexp(0.0, logits) - true * logits).mean())


def _argmax_miou(values: np.ndarray, label: np.ndarray) -> float:
    n = len(values)  # [classes, pixels]
    cells = label * (n + 1) + values.argmax(axis=0)
    return mean_iou(np.bincount(cells, minlength=n * (n + 1)).reshape(n, n + 1))
