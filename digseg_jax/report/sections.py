# SPDX-License-Identifier: Apache-2.0
"""What the page states in numbers: headline, text test, classes, tables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from digseg_jax.data.datasets.registry import title
from digseg_jax.evaluation.tables import estep_of, input_size, prompt_forms
from digseg_jax.report.tables import Cell, Number, Table, cell_of
from digseg_jax.viz.templates import is_number

# ensemble rule -> how the members' probabilities become one
_COMBINED = {
    "mean": "; their probabilities are averaged",
    "median": "; the median of their probabilities counts",
    "vote": "; the share of them that chose the query counts",
}
# word in the protocol's description -> its meaning for a reader
_PROTOCOLS = {
    "oracle": "only classes that the truth contains are asked for, which is easier than asking all",
    "gated": "all classes are asked for, and those judged absent are left out",
    "exhaustive": "every class is asked for on every image",
}


def headline(results: Mapping[str, Any], name: str, root: str = "") -> dict[str, Any]:
    """The scores, how they were measured, and what is known of the weights.

    name: of the data set, as the page shows it. root: folder that was trained on; "": not known.
    """
    # The default decoder averages before the mask exists, so that no rule applies.
    combined = _COMBINED.get(results.get("ensemble_rule", ""), "")
    if results.get("decoder") == "latent_mean":
        combined = "; the mean of their latents is decoded"

    # The protocol's own words, and their meaning if it is a known one.
    protocol = str(results["protocol"])
    known = next((v for k, v in _PROTOCOLS.items() if k in protocol.lower()), "")

    # Older results say less of how the network is asked, and of its weights.
    names = ("parameters", "steps", "started_from", "checkpoint")
    weights = results.get("weights") or {}
    trained, elsewhere = _training(weights.get("datasets") or [], results["dataset"], name, root)
    return {
        **{key: results[key] for key in ("split", "seed", "miou", "steps")},
        "dataset": name,
        "trained": trained,
        "elsewhere": elsewhere,
        "accuracy": results.get("accuracy"),
        "images": results["num_images"],
        "members": results["ensemble"],
        "estep": estep_of(results).replace("x", " × ", 1),
        "combined": combined if results["ensemble"] > 1 else "",
        "protocol": protocol,
        "protocol_meaning": known or "how classes are asked for and counted",
        "prompts": prompt_forms(results) if "templates" in results else "",
        "input": input_size(results) if "view_size" in results else "",
        "weights": {key: weights.get(key) for key in names},
    }


def _training(datasets: Sequence[str], scored: str, name: str, root: str) -> tuple[list[str], bool]:
    """Names of the training's data sets, and whether the scored one is surely none of them.

    scored, name: the scored data set, and as the page shows it. root: as of `headline`.
    """
    # Of a user's own folder the weights record only that it is one: it may be the scored folder.
    shown = [title(one, root) for one in datasets]
    unknown = scored == "folder" and any(re.fullmatch(r"folder(_\d+)?", one) for one in shown)
    own = ["a user's own folder" if one == "folder" else one for one in shown]
    return own, name not in shown and not unknown


def listening(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Whether the masks follow the words; None if it was not measured.

    A class that a gate left out was not asked for, and counts as an empty mask.
    """
    names = {"right": "matching_iou", "wrong": "wrong_query_iou", "absent": "absent_rate"}
    found = {name: results.get(key) for name, key in names.items()}
    if not any(map(is_number, found.values())):
        return None

    # How many times less a wrong word finds, if it finds less.
    right, wrong = found["right"], found["wrong"]
    times = right / wrong if is_number(right) and is_number(wrong) and wrong > 0 else 0.0
    gated = "gated" in str(results["protocol"]).lower()
    return {**found, "times": times if round(times, 1) > 1 else None, "gated": gated}


def class_bars(per_class: Mapping[str, Any], colors: Mapping[str, str]) -> dict[str, Any] | None:
    """Name, IoU and color of each class, best first; classes without a value come last."""

    def rank(entry: tuple[str, Any]) -> float:
        """Sort key: the negative IoU; a missing one counts as worse than any."""
        return -entry[1] if is_number(entry[1]) else 1.0

    # A class without a color of its own (not in the gallery) gets gray.
    ranked = sorted(per_class.items(), key=rank)
    bars = [(name, iou, colors.get(name, "#808080")) for name, iou in ranked]
    gaps = any(not is_number(iou) for iou in per_class.values())
    return {"bars": bars, "gaps": gaps} if bars else None


def estep_table(estep: Mapping[str, Any]) -> Table | None:
    """Table of ensemble size x steps; the best mIoU is bold, and several rows may share it."""
    rows = estep.get("rows") or []
    if not rows:
        return None
    best = max((r["miou"] for r in rows if is_number(r.get("miou"))), default=None)

    cells: list[list[Cell]] = []
    for row in rows:
        miou = row.get("miou")
        score = Number(miou, best=is_number(miou) and miou == best)
        size = f"{row.get('ensemble', '–')} × {row.get('steps', '–')}"
        speed = cell_of(row.get("queries_per_second"))
        cells.append([size, str(row.get("spacing", "–")), score, speed])

    return Table(["E × S", "spacing", "mIoU", "queries/s"], cells, estep.get("note") or "")


def bench_tables(tables: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The tables of files bench/*.json, in their order."""
    return [
        Table(
            columns=entry["columns"],
            rows=[[cell_of(value) for value in row] for row in entry["rows"]],
            title=entry["title"],
            note=entry.get("note") or "",
        )
        for entry in tables
    ]
