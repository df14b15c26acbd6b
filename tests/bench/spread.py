# SPDX-License-Identifier: Apache-2.0
"""How far the scores of a few seeds lie apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def deviation(values: Sequence[float] | np.ndarray) -> float | None:
    """The sample standard deviation (n - 1); None for fewer than two values, a dash in a report."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
