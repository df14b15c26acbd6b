# SPDX-License-Identifier: Apache-2.0
"""Which classes are confused: the most frequent mistakes, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from digseg_jax.arraytypes import Float
from digseg_jax.report.tables import Name, Number, Table

LISTED = 12  # mistakes in the list
LARGEST = 30  # classes up to which the whole matrix is readable
NOTHING = "no class"  # the matrix's last column: pixels without a prediction


def confusions(results: Mapping[str, Any], colors: Mapping[str, str]) -> dict[str, Any] | None:
    """The most frequent mistakes, and the matrix unless it is too large to be read.

    Returns:
      None if confusions were not counted, or no labeled pixel is wrong.
    """
    names, counts = list(results["per_class"]), np.asarray(results.get("confusion") or [[]], float)
    if counts.shape != (len(names), len(names) + 1):
        return None

    # Shares of the pixels of a true class; one that does not occur has none.
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    listed = _mistakes(counts, shares, [*names, NOTHING], colors)
    if not listed.rows:
        return None
    return {"mistakes": listed, "matrix": _matrix(shares, names) if len(names) <= LARGEST else None}


def _mistakes(
    counts: np.ndarray, shares: np.ndarray, names: Sequence[str], colors: Mapping[str, str]
) -> Table:
    """Table of the mistakes of the most pixels."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:LISTED]
    pairs = [divmod(int(i), wrong.shape[1]) for i in order]

    # The share of a rare class shows that it is lost; the share of all mistakes, what that costs.
    total = max(wrong.sum(), 1.0)
    named = [Name(name, colors.get(name, "transparent")) for name in names]
    rows = [
        [named[t], named[p], _percent(shares[t, p]), _percent(wrong[t, p] / total)]
        for t, p in pairs
        if wrong[t, p]
    ]
    columns = ["true class", "taken for", "% of the true class", "% of all mistakes"]
    return Table(columns, rows, "Most frequent mistakes")


def _percent(share: float) -> Number:
    """A share (0..1) in percent."""
    return Number(100 * float(share), 1)


def _matrix(shares: Float[np.ndarray, "c p"], names: Sequence[str]) -> dict[str, Any]:
    """The confusion matrix: names of the columns, and of each row the name and shares in percent."""
    # The last column is shown only where some pixel has no prediction.
    columns = [*names, NOTHING] if shares[:, -1].any() else names
    rows = [
        (name, [100 * float(share) for share in row[: len(columns)]])
        for name, row in zip(names, shares, strict=True)
    ]
    return {"columns": columns, "rows": rows}
