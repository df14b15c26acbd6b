# SPDX-License-Identifier: Apache-2.0
"""What happens to a broken example in the middle of an epoch: a clear error, or a counted skip."""

from __future__ import annotations

from typing import Any

import numpy as np

from digseg_jax.data.datasets.spec import IGNORE
from digseg_jax.errors import UserError
from digseg_jax.log import log

LABEL_DTYPES = (np.int32, np.int16, np.int8)  # the narrow ones come from shards, for training
TRIES = 10  # replacements of one example; a data set with more in a row is broken as a whole


class Guarded:
    """A source whose examples are whole: what it gives has been looked at.

    on_error "raise": any failure is a UserError that names the files and the reason. "skip": the
    failure is logged, counted in the example's "skipped" (int32), and another example takes its
    place, drawn from (seed, index): the same one whoever asks, and in every epoch.
    """

    def __init__(self, source: Any, num_classes: int, on_error: str = "raise", seed: int = 0):
        self.source, self.num_classes = source, num_classes
        self.on_error, self.seed = on_error, seed

    def __len__(self) -> int:
        return len(self.source)

    def files(self, index: int) -> dict[str, Any]:
        return self.source.files(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        at, index = index, int(index)
        for skipped in range(TRIES):
            try:
                return self._read(at) | {"skipped": np.int32(skipped)}
            except UserError as error:
                if self.on_error == "raise":
                    raise
                log.warning("skipped: %s", error)
            at = int(np.random.default_rng([self.seed, index, skipped]).integers(len(self)))
        raise UserError(
            f"example {index} and {TRIES - 1} drawn in its place are all broken: see the lines above"
        )

    def _read(self, index: int) -> dict[str, Any]:
        """Raises UserError, whatever went wrong."""
        try:
            example = self.source[index]
            self._check(example)
        except UserError:
            raise
        except Exception as error:  # readers meet files that nobody has foreseen
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{self._named(index)}: {type(error).__name__}: {reason}") from error
        return example

    def _named(self, index: int) -> str:
        try:
            return ", ".join(dict.fromkeys(str(p) for p in self.source.files(index).values()))
        except Exception:  # the error that is being told is the other one
            return f"example {index}"

    def _check(self, example: dict[str, Any]) -> None:
        image, label = example["image"], example["label"]
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"the image is {image.dtype} {image.shape}, not uint8 [h, w, 3]")
        if label.dtype not in LABEL_DTYPES or label.shape != image.shape[:2]:
            raise ValueError(f"the label is {label.dtype} {label.shape}, the image {image.shape}")
        if not label.size:
            raise ValueError("the image has no pixels")
        low, high = int(label.min()), int(label.max())
        if low < IGNORE or high >= self.num_classes:
            value = low if low < IGNORE else high
            raise ValueError(f"label id {value}; legal: {IGNORE}..{self.num_classes - 1}")
