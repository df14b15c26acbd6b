# SPDX-License-Identifier: Apache-2.0
"""Which classes are confused: the most frequent mistakes, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from digseg_jax.arraytypes import Float
from digseg_jax.report.markup import esc, number, section, table

LISTED = 12  # mistakes in the list
LARGEST = 30  # classes up to which the whole matrix is readable
NOTHING = "no class"  # the matrix's last column: pixels without a prediction


def confusion_section(results: Mapping[str, Any], colors: Mapping[str, str]) -> str:
    """Section of the confusions; empty if they were not counted, or no labeled pixel is wrong."""
    names, counts = list(results["per_class"]), np.asarray(results.get("confusion") or [[]], float)
    if counts.shape != (len(names), len(names) + 1):
        return ""

    # Shares of the pixels of a true class; one that does not occur has none.
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    listed = _mistakes(counts, shares, [*names, NOTHING], colors)
    if not listed:
        return ""
    full = len(names) <= LARGEST
    whole = _matrix(shares, names) if full else ""
    lead = "What the labeled pixels of a class were taken for, over all images"
    lead += "; below, each row is a true class." if full else "."
    return section("confusions", "Confusions", listed + whole, lead)


def _mistakes(
    counts: np.ndarray, shares: np.ndarray, names: Sequence[str], colors: Mapping[str, str]
) -> str:
    """Table of the mistakes of the most pixels; empty without mistakes."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:LISTED]
    pairs = [divmod(int(i), wrong.shape[1]) for i in order]

    # The share of a rare class shows that it is lost; the share of all mistakes, what that costs.
    total = max(wrong.sum(), 1.0)
    rows = [
        [_named(names[t], colors), _named(names[p], colors), _percent(shares[t, p]),
         _percent(wrong[t, p] / total)]
        for t, p in pairs if wrong[t, p]
    ]  # fmt: skip
    columns = ["true class", "taken for", "% of the true class", "% of all mistakes"]
    return table(columns, rows, "Most frequent mistakes") if rows else ""


def _named(name: str, colors: Mapping[str, str]) -> str:
    """A class's name behind a dot in its color."""
    color = colors.get(name, "transparent")
    return f'<span class="dot" style="background:{color}"></span> {esc(name)}'


def _percent(share: float) -> str:
    """A share (0..1) in percent."""
    return number(100 * float(share), 1)


def _matrix(shares: Float[np.ndarray, "c p"], names: Sequence[str]) -> str:
    """The confusion matrix as a table: shares of a row in percent, darker for more."""
    # The last column is shown only where some pixel has no prediction.
    columns = [*names, NOTHING] if shares[:, -1].any() else names
    head = "".join(f'<th scope="col"><span>{esc(name)}</span></th>' for name in columns)

    def cell(true: int, predicted: int) -> str:
        """One cell; its number is left out where it would be 0."""
        share = 100 * shares[true, predicted]
        told = f"{names[true]} taken for {columns[predicted]}: {share:.2f} %"
        shown = f"{share:.0f}" if share >= 0.5 else ""
        return f'<td style="--share:{share:.0f}%" title="{esc(told)}">{shown}</td>'

    rows = [
        f'<tr><th scope="row">{esc(name)}</th>'
        f"{''.join(cell(true, p) for p in range(len(columns)))}</tr>"
        for true, name in enumerate(names)
    ]
    caption = "Percent of the pixels of each true class (rows) by predicted class (columns)"
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Confusions, scrolls sideways">'
        f'<table class="matrix"><caption>{caption}</caption><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
