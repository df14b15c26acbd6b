# SPDX-License-Identifier: Apache-2.0
"""The paper's tables on the page: scores per protocol, recall of the gate, bars of every data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from digseg_jax.evaluation.suite_tables import COLUMNS, lines, note
from digseg_jax.report.markup import esc, is_number, number, section, table

MOST_BARS = 40  # classes shown of a large vocabulary: one half the best, the other the worst


def suite_tables(suites: Sequence[Mapping[str, Any]]) -> str:
    """Section of all suite_*.json of a run; empty if there is none."""
    parts = []
    for results in suites:
        rows = [[_cell(c) for c in row] for row in lines(results)]
        caption = f"<strong>{esc(results['suite'])}</strong>"
        parts.append(table(COLUMNS, rows, caption) + f'<p class="note">{esc(note(results))}</p>')

        # Details of each data set; both are empty where it was not measured.
        for row in results["rows"]:
            parts.append(_recall(row) + _classes(row))
    lead = "Measured by this run; what the paper states stands beside it and is marked as the paper's."
    return section("suites", "The paper's benchmarks", "".join(parts), lead)


def _cell(value: Any) -> str:
    """A cell as HTML; measured numbers, given as text in percent, are marked as numbers."""
    text = str(value)
    if text.replace(".", "", 1).isdigit():
        return f'<data value="{esc(text)}">{esc(text)}</data>'
    return esc(text)


def _recall(row: Mapping[str, Any]) -> str:
    """Table of the share of the truth that the gate's K best classes hold; empty without a gate."""
    recall = row.get("gate_recall")
    if not recall:
        return ""
    cells = [[esc(k), number(v.get("pixels")), number(v.get("classes"))] for k, v in recall.items()]
    caption = f"{esc(row['dataset'])}: recall of the gate by the number of classes it lets through"
    return table(["K", "of labeled pixels", "of present classes"], cells, caption)


def _classes(row: Mapping[str, Any]) -> str:
    """Folded bars of IoU per class, best first; empty if no class has one."""
    known = {n: v for n, v in (row.get("per_class") or {}).items() if is_number(v)}
    if not known:
        return ""

    # The middle of a large vocabulary says least.
    ranked = sorted(known.items(), key=lambda entry: -entry[1])
    half = MOST_BARS // 2
    shown = ranked if len(ranked) <= MOST_BARS else ranked[:half] + ranked[-half:]

    bars = "".join(
        f'<li><span class="name">{esc(name)}</span><span class="track" aria-hidden="true">'
        f'<span class="fill" style="width:{100 * iou:.2f}%;background:#4a7a8c"></span></span>'
        f'<span class="value">{number(iou)}</span></li>'
        for name, iou in shown
    )

    left_out = (
        f", {len(ranked) - len(shown)} in the middle left out" if len(shown) < len(ranked) else ""
    )
    return (
        f"<details><summary>{esc(row['dataset'])}: IoU of {len(ranked)} classes{left_out}</summary>"
        f'<ul class="bars many">{bars}</ul></details>'
    )
