# SPDX-License-Identifier: Apache-2.0
"""Masks by name on scenes of stamps: names that were trained, names that never were, wrong names.

Every scene is asked for the names that it shows and for one that it does not. A name's mask is
compared with its own object, and with the others' answers as the measure of what a wrong name gives.
An unseen name may share words with a trained one ("green pepper", "yellow pepper"); those that share
none are counted once more by themselves.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from digseg_jax.config.parse import sampling_settings, with_settings
from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import PartConfig
from digseg_jax.data.datasets.registry import Source
from digseg_jax.data.sources import open_part, spec_of
from digseg_jax.errors import UserError
from digseg_jax.io.progress import Progress
from digseg_jax.prediction.description import find_export, read_description
from digseg_jax.prediction.pretrained import load_segmenter
from digseg_jax.prediction.segmenter import Segmenter
from tests.bench.stamp_data import BACKGROUND
from tests.bench.stamp_files import unrelated
from tests.bench.stamp_scores import Ask, Row, score_scenes, summary
from tests.bench.stamp_sheet import Answered, sheet

PARTS = ("seen", "unseen")
SHOWN = 8  # scenes of each set on the sheet


def run(
    weights: str, root: Path, estep: str, images: int, sheet_path: Path | None = None
) -> dict[str, Any]:
    """Scores of ROOT/seen and ROOT/unseen, split val; masks are cut at probability 0.5.

    images: scenes of each set, the first ones; 0: all.

    Raises:
      UserError: no data sets there, no weights, or a sheet that cannot be written.
    """
    if images < 0:
        raise UserError(f"--images={images}: must be at least 1, or 0 for all")
    opened = {part: _open(root, part) for part in PARTS}  # told before the models are built
    folder = find_export(weights)
    trained = read_description(folder).training_config(folder)
    config = with_settings(trained, sampling_settings(estep))
    segmenter = load_segmenter(folder, config)
    ask = _asker(segmenter, EStep.parse(estep), config.seed)
    rows: dict[str, list[Row]] = {}
    shown: list[Answered] = []
    for part, (source, names) in opened.items():
        count = min(images, len(source)) if images else len(source)
        answered: list[Answered] = []
        show = answered.append if sheet_path else None
        rows[part] = score_scenes(_with_progress(source, count, part), names, ask, show)
        shown += [a._replace(title=f"{part} {a.title}") for a in answered[:SHOWN]]
    trained, others = (opened[part][1] for part in PARTS)
    result = {"weights": weights, "estep": estep} | {part: summary(rows[part]) for part in PARTS}
    strange = unrelated(set(others) - {BACKGROUND}, trained)
    if chosen := [row for row in rows["unseen"] if row["name"] in strange]:
        result["unrelated"] = summary(chosen)
    if sheet_path:
        _save_sheet(shown, sheet_path)
    return result


def _open(root: Path, part: str) -> tuple[Source, tuple[str, ...]]:
    """The scenes of a set's val split and the names of its classes by id."""
    if not (root / part / "classes.txt").is_file():
        raise UserError(f"--root={root}: no {part}/classes.txt; see tests.bench.stamp_data")
    where = PartConfig("folder", str(root / part))
    return open_part(where, "val"), spec_of(where).names


def _asker(segmenter: Segmenter, estep: EStep, seed: int) -> Ask:
    def ask(image: np.ndarray, names: Sequence[str], index: int) -> np.ndarray:
        return segmenter.predict_masks(
            [image],
            names,
            ensemble=estep.ensemble,
            steps=estep.steps,
            spacing=estep.spacing,
            key=seed,
            first=index,
        )[0]

    return ask


def _with_progress(source: Source, count: int, part: str) -> Iterable[dict[str, Any]]:
    progress, started = Progress(count, label=f"stamps {part}", unit="scenes"), time.monotonic()
    for i in range(count):
        yield source[i]
        progress.update(i + 1, (i + 1) / (time.monotonic() - started))
    progress.close()


def _save_sheet(shown: list[Answered], path: Path) -> None:
    try:
        sheet(shown).save(path)
    except (OSError, ValueError) as error:  # ValueError: a suffix that Pillow does not know
        raise UserError(f"--sheet={path}: cannot be written ({error})") from error


def table(result: dict[str, Any]) -> str:
    """Rows for people."""
    keys = ("matching", "error", "other", "absent", "absent_share", "found", "pointing")
    lines = [f"{'names':<10}{'number':>8}{'objects':>9}" + "".join(f"{key:>14}" for key in keys)]
    for part in (*PARTS, "unrelated"):
        if part in result:
            found = result[part]
            counts = f"{part:<10}{len(found['per_name']):>8}{found['objects']:>9}"
            lines.append(counts + "".join(f"{_cell(found[key]):>14}" for key in keys))
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
