# SPDX-License-Identifier: Apache-2.0
"""Tables of a suite: what was measured beside what the paper states, one line a score."""

from __future__ import annotations

from typing import Any

from digseg_jax.evaluation import paper
from digseg_jax.evaluation.tables import markdown, percent

COLUMNS = (
    "suite",
    "data set",
    "E-Step",
    "score",
    "measured",
    "the paper's figure",
    "images/s",
    "queries/s",
)


def lines(results: dict[str, Any]) -> list[list[Any]]:
    """Rows of `COLUMNS` from suite_NAME.json; scores in percent."""
    found = []
    for row in results["rows"]:
        where = [row["suite"], row["dataset"], row["estep"]]
        if "missing" in row:
            found.append([*where, "not measured: no data", *"––––"])
            continue
        found += [[*where, *cells] for cells in _cells(row)]
    return found


def note(results: dict[str, Any]) -> str:
    """What a reader has to know about the numbers."""
    return (
        f"Suite {results['suite']}, seed {results['seed']}; percent. Oracle asks only for classes that "
        "the truth contains and does not compare with the other protocols. The paper's figures are "
        "quoted from its project page, for its own weights and hardware."
    )


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    return note(results) + "\n\n" + markdown(COLUMNS, lines(results))


def _cells(row: dict[str, Any]) -> list[list[Any]]:
    suite, dataset, speed = row["suite"], row["dataset"], row.get("images_per_second")
    if row["metric"] == "miou":
        cells = []
        for protocol, scores in row["protocols"].items():
            stated = _stated(row) if protocol == row["headline_protocol"] else "–"
            rates = [f"{scores[k]:.3g}" for k in ("images_per_second", "queries_per_second")]
            cells.append([f"mIoU, {protocol}", percent(scores["miou"]), stated, *rates])
        return [*cells, ["boundary IoU", percent(row["boundary_iou"]), *"–––"]]
    rate = f"{speed:.3g}" if speed else "–"
    if row["metric"] == "region_dice":
        names = ("disc_dice", "cup_dice", "cdr_error")
        return [
            [n, percent(row[n]), paper.figure(suite, dataset, n), rate, "–"] for n in names if n in row
        ]
    cells = _foreground_cells(row, f"threshold {row['threshold']}", paper.FIGURES[suite][dataset], rate)
    if "searched" in row:
        found = row["searched"]
        label = f"threshold {found['threshold']}, found on {found['split']}"
        stated = paper.MONUSEG_SEARCHED if dataset == "monuseg" else {}
        cells += _foreground_cells(found, label, stated, "–")
    return cells


def _foreground_cells(
    scores: dict[str, Any], label: str, stated: dict[str, str], rate: str
) -> list[list[Any]]:
    return [
        [
            f"{name} {way}, {label}",
            percent(scores[f"{name}_{way}"]),
            stated.get(name, "–") if way == "pooled" else "–",
            rate,
            "–",
        ]
        for way in ("pooled", "per_image")
        for name in ("iou", "precision", "recall", "f1")
    ]


def _stated(row: dict[str, Any]) -> str:
    """The paper's mIoU; with the E-Step, from its scheduling table."""
    if row["suite"] == "semantic" and row["estep"] in paper.ESTEP:
        coco, ade, fps = paper.ESTEP[row["estep"]]
        return f"{coco if row['dataset'] == 'coco_stuff' else ade} at {fps} FPS"
    return paper.figure(row["suite"], row["dataset"], "miou")
