# SPDX-License-Identifier: Apache-2.0
"""--mode=eval --eval.suite=NAME: the tables of the paper, for one set of weights.

Every data set is looked for in config.data.root/NAME in its official layout. One that is not there is
named in the table as not measured. A killed run goes on with the image it was at.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from digseg_jax import paper
from digseg_jax.config import Config
from digseg_jax.data import registry
from digseg_jax.errors import UserError
from digseg_jax.evaluate import write_json
from digseg_jax.journal import Journal, identity_of
from digseg_jax.log import log
from digseg_jax.predictor import Predictor
from digseg_jax.segmentation.inference import EStep
from digseg_jax.suite_scores import Job, score
from digseg_jax.tables import markdown, percent

SUITES = {
    "open_vocab": (
        "ade20k_847",
        "pascal_context_459",
        "ade20k",
        "pascal_context_59",
        "pascal_voc",
        "cityscapes",
    ),
    "semantic": ("coco_stuff", "ade20k"),
    "driving": ("cityscapes", "bdd100k"),
    "deepglobe": ("deepglobe",),
    "medical": ("refuge2", "monuseg"),
    "phenobench": ("phenobench",),
}
NAMES = (*SUITES, "all")


def run_suite(config: Config, predictor: Predictor, folder: Path, name: str) -> dict[str, Any]:
    """Writes FOLDER/suite_NAME.json and .md; returns what the former holds.

    Raises:
      UserError: no such suite, or none of its data sets is there.
    """
    if name not in NAMES:
        raise UserError(f"--eval.suite={name}: legal values are {', '.join(NAMES)}")
    suites = SUITES if name == "all" else {name: SUITES[name]}
    esteps = [EStep(config.eval.ensemble, config.eval.steps, config.eval.spacing)]
    esteps += [e for e in map(EStep.parse, config.eval.estep) if e not in esteps]
    results: dict[str, Any] = {"suite": name, "seed": config.seed, "rows": []}
    for suite, datasets in suites.items():
        for dataset in datasets:
            for estep in esteps if suite == "semantic" else esteps[:1]:
                row = {"suite": suite, "dataset": dataset, "estep": str(estep)}
                results["rows"].append(row | _one(config, predictor, folder, dataset, estep))
    if all("missing" in row for row in results["rows"]):
        raise UserError(
            f"--eval.suite={name}: no data set of it under config.data.root={config.data.root!r}; "
            f"the first: {results['rows'][0]['missing']}"
        )
    write_json(folder / f"suite_{name}.json", results)
    (folder / f"suite_{name}.md").write_text(table(results), encoding="utf-8")
    return results


def _one(
    config: Config, predictor: Predictor, folder: Path, dataset: str, estep: EStep
) -> dict[str, Any]:
    """The scores of a data set, or why there are none."""
    root = Path(config.data.root).expanduser() / dataset
    try:
        facts = registry.spec(dataset, root)
        source = registry.open_source(dataset, root, facts.eval_split)
        train = _training_side(dataset, root, facts.train_split, facts.metric)
    except UserError as error:
        log.info("%s: not measured (%s)", dataset, error)
        return {"missing": str(error)}
    job = Job(config, predictor, facts, estep)
    settings = [
        dataclasses.asdict(config.eval),
        config.seed,
        dataset,
        str(estep),
        len(source),
        predictor.task.codec,
    ]
    identity = identity_of(predictor.params, settings)
    journal = Journal(folder / "journal", f"{dataset}_{estep}".replace(":", "_"), identity)
    try:
        found = score(job, source, train, journal)
    finally:
        journal.close()
    return {"split": facts.eval_split, "num_images": len(journal.done), **found}


def _training_side(dataset: str, root: Path, split: str, metric: str) -> registry.Source | None:
    """The training split where a threshold is searched; None, and said so, where it is not there."""
    if metric != "foreground":
        return None
    try:
        return registry.open_source(dataset, root, split)
    except UserError as error:
        log.info("%s: no threshold search (%s)", dataset, error)
        return None


def table(results: dict[str, Any]) -> str:
    """Markdown: a line a score, what was measured beside what the paper states."""
    lines = []
    for row in results["rows"]:
        where = [row["suite"], row["dataset"], row["estep"]]
        if "missing" in row:
            lines.append([*where, "not measured: no data", "–", "–", "–"])
            continue
        lines += [[*where, *cells] for cells in _cells(row)]
    columns = ["suite", "data set", "E-Step", "score", "measured", "the paper's figure", "images/s"]
    note = (
        f"Suite {results['suite']}, seed {results['seed']}; percent. *Oracle* asks only for classes "
        "that the truth contains and does not compare with the other protocols. The paper's figures "
        "are quoted from its project page, for its own weights and hardware.\n\n"
    )
    return note + markdown(columns, lines)


def _cells(row: dict[str, Any]) -> list[list[Any]]:
    suite, dataset, speed = row["suite"], row["dataset"], row.get("images_per_second")
    if row["metric"] == "miou":
        cells = []
        for protocol, scores in row["protocols"].items():
            stated = _stated(row) if protocol == row["headline_protocol"] else "–"
            rate = f"{scores['images_per_second']:.3g}"
            cells.append([f"mIoU, {protocol}", percent(scores["miou"]), stated, rate])
        return [*cells, ["boundary IoU", percent(row["boundary_iou"]), "–", "–"]]
    rate = f"{speed:.3g}" if speed else "–"
    if row["metric"] == "region_dice":
        names = ("disc_dice", "cup_dice", "cdr_error")
        return [[n, percent(row[n]), paper.figure(suite, dataset, n), rate] for n in names if n in row]
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
