# SPDX-License-Identifier: Apache-2.0
"""Checks examples as they are read: a broken one is a clear error, or is skipped and counted."""

from __future__ import annotations

from typing import Any

import numpy as np

from digseg_jax.data.datasets.spec import IGNORE
from digseg_jax.errors import UserError
from digseg_jax.log import log

LABEL_DTYPES = (np.int32, np.int16, np.int8)  # narrow labels come from shards, for training
# Examples tried for one place: ten broken ones in a row mean that the whole data set is broken.
TRIES = 10


class Guarded:
    """Source that checks every example of another source.

    Args:
      on_error: "raise" makes any failure a UserError that names the files and the reason. "skip" logs
        the failure, counts it in the example's "skipped" (int32), and puts another example in its
        place, drawn from (seed, index): the same one in every process and every epoch.

    Raises:
      UserError: on access.
    """

    def __init__(self, source: Any, num_classes: int, on_error: str = "raise", seed: int = 0):
        self.source, self.num_classes = source, num_classes
        self.on_error, self.seed = on_error, seed

    def __len__(self) -> int:
        return len(self.source)

    def files(self, index: int) -> dict[str, Any]:
        """Paths of an example's files."""
        return self.source.files(index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Example `index` or its replacement; "skipped" (int32) counts the broken ones before it."""
        at, index = index, int(index)
        for skipped in range(TRIES):
            try:
                return self._read(at) | {"skipped": np.int32(skipped)}
            except UserError as error:
                if self.on_error == "raise":
                    raise
                log.warning("skipped: %s", error)

            # Drawn from numbers that every process knows, so that all read the same replacement.
            at = int(np.random.default_rng([self.seed, index, skipped]).integers(len(self)))

        raise UserError(
            f"example {index} and {TRIES - 1} drawn in its place are all broken: see the messages above"
        )

    def _read(self, index: int) -> dict[str, Any]:
        """Reads and checks one example.

        Raises:
          UserError: for every fault; names the example's files.
        """
        try:
            example = self.source[index]
            self._check(example)
        except UserError:
            raise
        except Exception as error:  # readers meet files of unforeseen kinds
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{self._named(index)}: {type(error).__name__}: {reason}") from error
        return example

    def _named(self, index: int) -> str:
        """Paths of an example's files for a message, or its index."""
        try:
            return ", ".join(dict.fromkeys(str(p) for p in self.source.files(index).values()))
        except Exception:  # must not hide the error that is reported
            return f"example {index}"

    def _check(self, example: dict[str, Any]) -> None:
        """Checks types, shapes and label ids.

        Raises:
          ValueError: the first thing that is wrong.
        """
        # Types and shapes cost nothing to compare.
        image, label = example["image"], example["label"]
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"the image is {image.dtype} {image.shape}, not uint8 [h, w, 3]")
        if label.dtype not in LABEL_DTYPES or label.shape != image.shape[:2]:
            raise ValueError(f"the label is {label.dtype} {label.shape}, the image {image.shape}")

        # The range of ids last: it reads every pixel.
        if not label.size:
            raise ValueError("the image has no pixels")
        low, high = int(label.min()), int(label.max())
        if low < IGNORE or high >= self.num_classes:
            value = low if low < IGNORE else high
            raise ValueError(f"label id {value}; legal: {IGNORE}..{self.num_classes - 1}")
