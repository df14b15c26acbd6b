# SPDX-License-Identifier: Apache-2.0
"""--mode=eval --eval.suite=NAME: the tables of the paper, for one set of weights.

Every data set is looked for in config.data.root/NAME in its official layout. One that is not there is
named in the table as not measured. A killed run goes on with the image it was at.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from digseg_jax.config import Config
from digseg_jax.data import registry
from digseg_jax.errors import UserError
from digseg_jax.evaluate import write_json
from digseg_jax.journal import Journal, identity_of
from digseg_jax.log import log
from digseg_jax.predictor import Predictor
from digseg_jax.segmentation.inference import EStep
from digseg_jax.suite_scores import Job, score
from digseg_jax.suite_tables import table

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
        dataclasses.asdict(config),  # all of it: size, root, autoencoder and text tower count too
        dataset,
        str(estep),
        len(source),
        predictor.scale,
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
