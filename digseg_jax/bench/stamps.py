# SPDX-License-Identifier: Apache-2.0
"""Masks by name on scenes of stamps: names that were trained, names that never were, wrong names.

Every scene is asked for the names that it shows and for one that it does not. A name's mask is
compared with its own object, and with the others' answers as the measure of what a wrong name gives.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from digseg_jax import assets
from digseg_jax import config as config_lib
from digseg_jax.config import PartConfig
from digseg_jax.data.opening import open_part, spec_of
from digseg_jax.data.stamps import BACKGROUND
from digseg_jax.errors import UserError
from digseg_jax.predict import load_predictor
from digseg_jax.segmentation.inference import EStep

FOUND = 0.5  # IoU from which a name counts as found

# (picture [h, w, 3], names, number of the scene) -> probabilities [names, h, w]
Ask = Callable[[np.ndarray, list[str], int], np.ndarray]


def run(weights: str, root: Path, estep: str, images: int) -> dict[str, Any]:
    """Scores of ROOT/seen and ROOT/unseen, split val; masks are cut at probability 0.5.

    Raises:
      UserError: no data sets there, or no weights.
    """
    config = config_lib.with_estep(config_lib.Config(), estep)
    predictor = load_predictor(config, Path(assets.resolve(weights)))
    parsed = EStep.parse(estep)

    def ask(picture: np.ndarray, names: list[str], index: int) -> np.ndarray:
        return predictor.predict_masks(
            [picture], names, ensemble=parsed.ensemble, steps=parsed.steps, spacing=parsed.spacing,
            key=config.seed, first=index,
        )[0]  # fmt: skip

    result: dict[str, Any] = {"weights": weights, "estep": estep}
    for part in ("seen", "unseen"):
        if not (root / part / "classes.txt").is_file():
            raise UserError(f"--root={root}: no {part}/classes.txt; see digseg_jax.data.stamps")
        source = PartConfig("folder", str(root / part))
        scenes = open_part(source, "val")
        facts = spec_of(source)
        count = min(images, len(scenes)) if images else len(scenes)
        result[part] = score_scenes((scenes[i] for i in range(count)), facts.names, ask)
    return result


def score_scenes(scenes: Any, names: tuple[str, ...], ask: Ask) -> dict[str, Any]:
    """Means over all objects of all scenes, and each name's mean IoU."""
    rows, per_name = [], {}
    asked = [n for n in names if n != BACKGROUND]
    for index, scene in enumerate(scenes):
        label = np.asarray(scene["label"])
        shown = [c for c in np.unique(label) if c >= 0 and names[c] != BACKGROUND]
        own = [names[c] for c in shown]
        others = [n for n in asked if n not in own]
        absent = others[int(np.random.default_rng(index).integers(len(others)))]
        answers = ask(scene["image"], [*own, absent], index) > 0.5
        objects = np.stack([label == c for c in shown])
        scored = score_scene(answers, objects)
        rows += scored
        for name, row in zip(own, scored, strict=True):
            per_name.setdefault(name, []).append(row["matching"])
    means = {key: float(np.nanmean([row[key] for row in rows])) for key in rows[0]}
    return {
        "scenes": index + 1,
        "objects": len(rows),
        **means,
        "per_name": {name: float(np.mean(v)) for name, v in sorted(per_name.items())},
    }


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
        rest = [iou[j, i] for j in range(k) if j != i]
        rows.append(
            {
                "matching": iou[i, i],
                "other": float(np.mean(rest)) if rest else np.nan,
                "absent": iou[k, i],
                "absent_share": float(answers[k].mean()),
                "found": float(iou[i, i] > FOUND),
                "pointing": float(on[i, i] > 0 and on[i].argmax() == i),
            }
        )
    return rows


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / max((a | b).sum(), 1))


def table(result: dict[str, Any]) -> str:
    """Rows for people."""
    keys = ("matching", "other", "absent", "absent_share", "found", "pointing")
    rows = ["names     " + "".join(f"{key:>14}" for key in keys)]
    for part in ("seen", "unseen"):
        rows.append(f"{part:<10}" + "".join(f"{result[part][key]:>14.3f}" for key in keys))
    return "\n".join(rows)
