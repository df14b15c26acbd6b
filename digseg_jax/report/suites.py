# SPDX-License-Identifier: Apache-2.0
"""Tables of suites on the page: scores per protocol, recall of the gate, bars of every data set."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from digseg_jax.data.datasets.domains import REST
from digseg_jax.evaluation.suite_tables import COLUMNS, lines, note
from digseg_jax.report.tables import Cell, Number, Table
from digseg_jax.viz.templates import is_number

# columns whose texts may be numbers; a data set may be called 2021
NUMERIC = ("measured", "the paper's figure", "images/s", "queries/s")
MOST_BARS = 40  # classes shown of a large vocabulary: one half the best, the other the worst


def suite_tables(results: Mapping[str, Any]) -> dict[str, Any]:
    """A suite_*.json as the page shows it: its table, and the details of each data set."""
    rows = [[_cell(*pair) for pair in zip(COLUMNS, row, strict=True)] for row in lines(results)]
    return {
        "name": results["suite"],
        "scores": Table(COLUMNS, rows, title=str(results["suite"]), note=note(results)),
        "rows": [
            {"dataset": row["dataset"], "recall": _recall(row), **_bars(row)} for row in results["rows"]
        ],
    }


def scored_classes(row: Mapping[str, Any]) -> dict[str, Any]:
    """IoU by name of the classes in a data set's score.

    A domain's background is left out, and of its other classes one that no label shows has None.
    """
    per_class = dict(row.get("per_class") or {})
    if row.get("metric") != "asked":
        return per_class
    scored = row.get("scored_classes", per_class)  # results of earlier versions do not say
    own = [name for name in per_class if name not in REST]
    return {name: per_class[name] if name in scored else None for name in own}


def _cell(column: str, value: Any) -> Cell:
    """A cell of the suite's table; measured numbers are given as text in percent."""
    text = str(value)
    if column not in NUMERIC or not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return text
    digits = len(text.partition(".")[2])
    return Number(float(text) if digits else int(text), digits)


def _recall(row: Mapping[str, Any]) -> Table | None:
    """Table of the share of the truth that the gate's K best classes hold; None without a gate."""
    recall = row.get("gate_recall")
    if not recall:
        return None
    cells: list[list[Cell]] = [
        [str(k), Number(v.get("pixels")), Number(v.get("classes"))] for k, v in recall.items()
    ]
    caption = f"{row['dataset']}: recall of the gate by the number of classes it lets through"
    return Table(["K", "of labeled pixels", "of present classes"], cells, caption)


def _bars(row: Mapping[str, Any]) -> dict[str, Any]:
    """(name, IoU) of the classes that have one, best first; of many, the middle is left out."""
    known = {name: iou for name, iou in scored_classes(row).items() if is_number(iou)}
    ranked = sorted(known.items(), key=lambda entry: -entry[1])

    # The middle of a large vocabulary says least.
    half = MOST_BARS // 2
    shown = ranked if len(ranked) <= MOST_BARS else ranked[:half] + ranked[-half:]
    return {"bars": shown, "classes": len(ranked), "left_out": len(ranked) - len(shown)}
