# SPDX-License-Identifier: Apache-2.0
"""Reads labels that are one-channel images of class indices, the form of most data sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from digseg_jax.data.datasets.decode import LabelTable, read_index_image
from digseg_jax.data.datasets.spec import DatasetSpec


class IndexLabels:
    """Reader of index images (8 or 16 bits, or the indices of a palette) through the spec's table."""

    def __init__(self, spec: DatasetSpec):
        self.table = LabelTable.of(spec)

    def __call__(self, path: Path, size: tuple[int, int]) -> np.ndarray:
        """Ids, int32 [h, w]; `size` is not needed, the file has its own.

        Raises:
          UnreadableError, LabelValueError: with the file's path.
        """
        return self.table(read_index_image(path), path)
