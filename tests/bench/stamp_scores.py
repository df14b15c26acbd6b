# SPDX-License-Identifier: Apache-2.0
"""Scores of masks by name, whoever made the masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from digseg_jax.errors import UserError
from tests.bench.stamp_data import BACKGROUND
from tests.bench.stamp_sheet import Answered

FOUND = 0.5  # IoU from which a name counts as found
MEANS = ("matching", "other", "absent", "found", "pointing")

# (image [h, w, 3], names, number of the scene) -> probabilities [names, h, w]
Ask = Callable[[np.ndarray, Sequence[str], int], np.ndarray]
Row = dict[str, Any]  # an object of a scene: "name", "scene" and what `score_scene` says of it


def score_scenes(
    scenes: Iterable[dict[str, Any]],
    names: Sequence[str],
    ask: Ask,
    show: Callable[[Answered], None] | None = None,
) -> list[Row]:
    """A row for every object of every scene; which absent name is asked depends on the scene's number.

    names: of the classes by id; `BACKGROUND` among them is not asked for. show: gets each scene.

    Raises:
      UserError: a scene that shows every name, so that none is absent.
    """
    rows: list[Row] = []
    for index, scene in enumerate(scenes):
        label = np.asarray(scene["label"])
        shown = [int(c) for c in np.unique(label) if c >= 0 and names[c] != BACKGROUND]
        own = [names[c] for c in shown]
        others = [n for n in names if n != BACKGROUND and n not in own]
        if not others:
            raise UserError(f"scene {index}: shows every name of {', '.join(own)}; none is absent")
        absent = others[int(np.random.default_rng(index).integers(len(others)))]
        answers = ask(scene["image"], [*own, absent], index) > 0.5
        objects = np.stack([label == c for c in shown]) if shown else np.zeros((0, *label.shape), bool)
        scored = score_scene(answers, objects)
        rows += [{"name": n, "scene": index} | s for n, s in zip(own, scored, strict=True)]
        if show:
            show(Answered(str(index), scene["image"], [*own, f"absent: {absent}"], answers, objects))
    return rows


def score_scene(answers: np.ndarray, objects: np.ndarray) -> list[dict[str, float]]:
    """For each of k objects (bool [k, h, w]), given the masks bool [k + 1, h, w] of their names and of
    one that the scene does not show:

    matching: IoU with its own name's mask. other: with those of the others' names (mean). absent: with
    that of the absent name, which itself covers absent_share of the scene. found: whether `matching`
    is above a half. pointing: whether its name's mask lies on it more than on any other object.
    """
    k = len(objects)
    iou = np.array([[_iou(a, o) for o in objects] for a in answers])
    on = np.array([[(a & o).sum() for o in objects] for a in answers[:k]])
    rows = []
    for i in range(k):
        rest = [j for j in range(k) if j != i]
        rows.append(
            {
                "matching": float(iou[i, i]),
                "other": float(np.mean(iou[rest, i])) if rest else float("nan"),
                "absent": float(iou[k, i]),
                "absent_share": float(answers[k].mean()),
                "found": float(iou[i, i] > FOUND),
                "pointing": float(on[i, i] > max(on[i, rest], default=0)),
            }
        )
    return rows


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Means over objects, of absent_share over scenes; each name's mean IoU with its own mask.

    error: the standard error of `matching` over names, as objects of one name are much alike.

    Raises:
      UserError: no rows.
    """
    if not rows:
        raise UserError("no scene shows an object")
    per_name: dict[str, list[float]] = {}
    for row in rows:
        per_name.setdefault(row["name"], []).append(row["matching"])
    means = {name: float(np.mean(values)) for name, values in sorted(per_name.items())}
    shares = {row["scene"]: row["absent_share"] for row in rows}
    spread = np.std(list(means.values()), ddof=1) / len(means) ** 0.5 if len(means) > 1 else 0.0
    return {
        "scenes": len(shares),
        "objects": len(rows),
        **{key: _mean([row[key] for row in rows]) for key in MEANS},
        "error": float(spread),
        "absent_share": _mean(list(shares.values())),
        "per_name": means,
    }


def _mean(values: list[float]) -> float | None:
    """Leaves out nan, which is no JSON; None if nothing is left."""
    known = [v for v in values if not np.isnan(v)]
    return float(np.mean(known)) if known else None
