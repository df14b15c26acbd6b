# SPDX-License-Identifier: Apache-2.0
"""Fits the scale and biases that turn a decoded mask into a probability, on a split of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from digseg_jax.errors import UserError
from digseg_jax.io.json_file import read_json
from digseg_jax.metrics.confusion import mean_iou

SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the candidates
BIAS_STEPS = (-1.0, -0.5, -0.25, -0.1, 0.1, 0.25, 0.5, 1.0)  # changes of a bias that are tried
UNFITTED = "none"  # `Calibration.split` of `identity`
MAX_SCALE = 100.0  # of a stored calibration; far above every candidate
MAX_BIAS = 4.0  # logits; largest absolute bias
SWEEPS = 3  # most passes over the classes; a pass without improvement is the last


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Probability of a mask: p = sigmoid(scale * mask score + bias of the class).

    Attributes:
      scale: logits per unit of the mask score, which lies in [-1, 1].
      bias: logits, one for each class.
      split: the split that both were fitted on; UNFITTED for `identity`.
    """

    scale: float
    bias: tuple[float, ...]
    split: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {"scale": self.scale, "bias": list(self.bias), "split": self.split}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Calibration:
        """Calibration from the form of `to_dict`."""
        return cls(values["scale"], tuple(values["bias"]), values["split"])


def stored_scale(path: Path) -> float:
    """The scale in a calibration's file.

    Raises:
      UserError: unreadable, or a scale that no fit gives: masks would be empty or inverted.
    """
    scale = read_json(path, {"scale": float})["scale"]
    if not 0 < scale <= MAX_SCALE:
        raise UserError(f"{path}: scale={scale}: must be above 0 and at most {MAX_SCALE:g}")
    return float(scale)


def identity(num_classes: int, scale: float = 2.0) -> Calibration:
    """Calibration without fitting: the given scale, no bias."""
    return Calibration(scale, (0.0,) * num_classes, UNFITTED)


def fit(
    evidence: np.ndarray,
    label: np.ndarray,
    split: str,
    scale: float | None = None,
    *,
    exclusive: bool = False,
    background: bool = False,
    covers: Sequence[Sequence[int]] = (),
) -> Calibration:
    """Fits the scale by cross-entropy of the members' masks, and biases by mIoU of the argmax.

    Args:
      evidence: mask scores, float [pixels, classes] or, for an ensemble, [pixels, classes, members], in
        [-1, 1]. Members are combined as an evaluation combines them by default: by the mean of their
        probabilities.
      label: int [pixels]; pixels labeled -1 are left out.
      split: the split that they come from, for the result.
      scale: a known scale (a palette's follows from its autoencoder); only biases are fitted then.
      exclusive: True if a member's probabilities are a softmax over the classes, rather than one
        sigmoid for each class (`Codec.exclusive`).
      background: True if it is a softmax over the classes and none of them (`Codec.background`).
      covers: for each class the labels whose pixels its mask covers, as `EvalExamples.covers`; empty:
        its own alone. What a class covers is subtracted from its mask, as an evaluation does.
    """
    inner = tuple(tuple(c for c in covered if c != k) for k, covered in enumerate(covers))
    kind = _Kind(exclusive, background, inner if any(inner) else ())

    # Classes first, because a trial changes the values of one class only: [classes, pixels, members].
    evidence, label = evidence[label >= 0].astype(np.float32), label[label >= 0]
    members = np.ascontiguousarray(np.moveaxis(evidence.reshape(*evidence.shape[:2], -1), 1, 0))

    # The scale that makes the probabilities fit best, before any bias.
    if scale is None:
        true = np.eye(len(members), dtype=np.float32)[label].T[..., None]
        if not exclusive:  # a disc's mask covers the cup; of colors a pixel has one
            for c, covered in enumerate(kind.inner):
                true[c] += true[list(covered)].sum(axis=0)
        scale = min(SCALES, key=lambda s: _cross_entropy(s * members, true, kind))

    # Coordinate ascent on mIoU, which has no gradient: one class at a time, a few steps each way. The
    # least gain keeps a bias from drifting for a handful of pixels.
    logits = scale * members
    bias = np.zeros(len(members), np.float32)
    values = _values(logits, bias, kind)
    best = _argmax_miou(values, label, kind.inner)
    for _ in range(SWEEPS):
        before = best

        for c in range(len(bias)):
            for delta in BIAS_STEPS:
                trial = bias.copy()
                trial[c] = np.clip(trial[c] + delta, -MAX_BIAS, MAX_BIAS)
                tried = _rebiased(values, logits, trial, c, kind)
                found = _argmax_miou(tried, label, kind.inner)
                if found > best + 1e-5:
                    best, bias, values = found, trial, tried

        if best == before:
            break
    return Calibration(scale, tuple(float(b) for b in bias), split)


class _Kind(NamedTuple):
    """How logits become probabilities; see `fit`."""

    softmax: bool
    background: bool = False
    inner: tuple[tuple[int, ...], ...] = ()  # for each class the others that it covers; (): none does


def _values(logits: np.ndarray, bias: np.ndarray, kind: _Kind) -> np.ndarray:
    """Values that the argmax compares, [classes, pixels], from logits [classes, pixels, members]."""
    biased = logits + bias[:, None, None]
    if biased.shape[2] == 1 and not kind.inner:  # one member's argmax needs no probabilities
        return biased[..., 0]
    return (_softmax(biased, kind) if kind.softmax else _sigmoid(biased)).mean(axis=2)


def _rebiased(
    values: np.ndarray, logits: np.ndarray, bias: np.ndarray, c: int, kind: _Kind
) -> np.ndarray:
    """`_values` where only the bias of class c has changed since `values`."""
    # All classes of a softmax share a denominator; where nothing is made a probability, there is none.
    if kind.softmax and (logits.shape[2] > 1 or kind.inner):
        return _values(logits, bias, kind)

    # A copy: the caller keeps the old values if the trial is no better.
    values = values.copy()
    values[c] = _values(logits[c : c + 1], bias[c : c + 1], kind)[0]
    return values


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def _softmax(logits: np.ndarray, kind: _Kind) -> np.ndarray:
    """Softmax over the classes, axis 0, and the background with its logit 0 if there is one."""
    largest = logits.max(axis=0)
    if kind.background:
        largest = np.maximum(largest, 0.0)
    weights = np.exp(logits - largest)
    return weights / (weights.sum(axis=0) + (np.exp(-largest) if kind.background else 0.0))


def _cross_entropy(logits: np.ndarray, true: np.ndarray, kind: _Kind) -> float:
    """Mean cross-entropy of [classes, pixels, members] with the one-hot labels [classes, pixels, 1]."""
    if kind.softmax:
        found = (true * _softmax(logits, kind)).sum(axis=0)
        return float(-np.log(np.maximum(found, 1e-12)).mean())
    return float((np.logaddexp(0.0, logits) - true * logits).mean())


def _argmax_miou(values: np.ndarray, label: np.ndarray, inner: Sequence[Sequence[int]] = ()) -> float:
    """mIoU of the argmax of values [classes, pixels] with the labels [pixels]; inner: see `_Kind`."""
    # A class gets what the classes that it covers leave of its mask, as in `counts.count_image`.
    if inner:
        masks, values = values, values.copy()
        for c, covered in enumerate(inner):
            for other in covered:
                values[c] = np.minimum(values[c], 1.0 - masks[other])

    # Confusion counts in one `bincount`, as in `metrics.confusion`; the last column ("no class") is 0.
    n = len(values)
    cells = label * (n + 1) + values.argmax(axis=0)
    return mean_iou(np.bincount(cells, minlength=n * (n + 1)).reshape(n, n + 1))
