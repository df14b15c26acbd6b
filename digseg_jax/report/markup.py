# SPDX-License-Identifier: Apache-2.0
"""Helpers for HTML text: escaping, numbers that carry their full value, tables, sections."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any, TypeGuard

MANY = 16  # classes up to which a list of them needs neither columns nor a search


def esc(text: Any) -> str:
    """Text made safe for element content and for quoted attributes."""
    return html.escape(str(text), quote=True)


def is_number(value: Any) -> TypeGuard[float]:
    """True for a finite int or float (not for bool)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, digits: int = 3) -> str:
    """A <data> element: rounded for reading, its value unrounded; a dash for what is no number."""
    if not is_number(value):
        return '<span class="none" title="undefined here">–</span>'
    # Integers with thousands separators, floats with `digits` decimals.
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"
    return f'<data value="{value!r}" title="{value!r}">{shown}</data>'


def percent(value: float, digits: int = 1) -> str:
    """A <data> element that shows a share (0..1) as percent and carries the share."""
    return f'<data value="{value!r}" title="{value!r}">{100 * value:.{digits}f} %</data>'


def significant(value: Any) -> str:
    """A <data> element with at least three significant digits; other values become escaped text."""
    if value is None:
        return number(None)
    if not is_number(value):
        return esc(value)
    if isinstance(value, int):
        return number(value)

    # Decimals after the first significant digit: 0.01234 -> 0.0123. At most 8.
    size = math.floor(math.log10(abs(value))) if value else 0
    return number(value, min(max(2 - size, 1), 8))


def table(columns: Sequence[Any], rows: Sequence[Sequence[Any]], caption: str) -> str:
    """A table that scrolls sideways; cells are ready HTML, columns are text, the caption is ready HTML.

    Columns of numbers are set flush right, columns of words flush left.
    """
    # A column is numeric if any of its cells is a number of `number` or `percent`.
    numeric = [any("<data" in str(row[i]) for row in rows) for i in range(len(columns))]
    kind = [' class="num"' if n else "" for n in numeric]

    head = "".join(f'<th scope="col"{k}>{esc(c)}</th>' for c, k in zip(columns, kind, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{k}>{c}</td>" for c, k in zip(row, kind, strict=True)) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table, scrolls sideways">'
        f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def search_field(finds: str) -> str:
    """A field that leaves those of many elements whose name contains its text; finds: CSS selector."""
    return (
        '<input type="search" class="find" placeholder="find a class" aria-label="Find a class" '
        f'autocomplete="off" data-finds="{esc(finds)}">'
    )


def section(key: str, title: str, body: str, lead: str = "") -> str:
    """A section of the page, empty if there is no body; `body` and `lead` are ready HTML."""
    if not body:
        return ""
    intro = f'<p class="lead">{lead}</p>' if lead else ""
    return (
        f'<section id="{key}" aria-labelledby="{key}-title">'
        f'<h2 id="{key}-title">{esc(title)}</h2>{intro}{body}</section>'
    )
