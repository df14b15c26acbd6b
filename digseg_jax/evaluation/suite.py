# SPDX-License-Identifier: Apache-2.0
"""--mode=eval --suite=NAME: the tables of the paper, for one set of weights.

Every data set is looked for in config.data.root/NAME, in its official layout or as prepared shards, on
a disk or in a bucket. One that is not there is named in the table as not measured. All devices and
processes share the work; a killed run goes on with the images it was at.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from digseg_jax.arraytypes import Params
from digseg_jax.config.parse import to_dict
from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import Config, PartConfig
from digseg_jax.data.sources import spec_of
from digseg_jax.errors import UserError
from digseg_jax.evaluation.evaluator import Evaluator
from digseg_jax.evaluation.examples import EvalExamples, eval_examples
from digseg_jax.evaluation.job import searched_on
from digseg_jax.evaluation.journal import Journal, identity_of
from digseg_jax.evaluation.suite_tables import table
from digseg_jax.io.storage import AnyPath, write_bytes, write_json
from digseg_jax.log import log
from digseg_jax.prediction.segmenter import Segmenter
from digseg_jax.runtime.collectives import fetch_to_main
from digseg_jax.runtime.distributed import is_main, together
from digseg_jax.segmentation import calibration as calibration_lib

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


def check_suite(name: str) -> None:
    """Raises UserError: no such suite."""
    if name not in NAMES:
        raise UserError(f"--suite={name}: legal values are {', '.join(NAMES)}")


def run_suite(
    config: Config,
    segmenter: Segmenter,
    params: Params,
    folder: AnyPath,
    name: str,
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes FOLDER/suite_NAME.json and .md; returns what the former holds.

    params: the weights, by which a killed run's journal is known again. about: what is known of them,
    for the former file.

    Raises:
      UserError: no such suite, or none of its data sets is there.
    """
    check_suite(name)
    suites = SUITES if name == "all" else {name: SUITES[name]}
    esteps = [EStep(config.eval.ensemble, config.eval.steps, config.eval.spacing)]
    esteps += [e for e in map(EStep.parse, config.eval.sweep) if e not in esteps]
    weights = fetch_to_main(params)

    results: dict[str, Any] = {"suite": name, "seed": config.seed, "rows": []}
    results |= {"weights": about} if about else {}
    for suite, datasets in suites.items():
        for dataset in datasets:
            for estep in esteps if suite == "semantic" else esteps[:1]:
                row = {"suite": suite, "dataset": dataset, "estep": str(estep)}
                results["rows"].append(row | _one(config, segmenter, weights, folder, dataset, estep))
    if all("missing" in row for row in results["rows"]):
        raise UserError(
            f"--suite={name}: no data set of it under config.data.root={config.data.root!r}; "
            f"the first: {results['rows'][0]['missing']}"
        )
    with together("the files of the suite"):
        if is_main():
            write_json(folder / f"suite_{name}.json", results)
            write_bytes(folder / f"suite_{name}.md", table(results).encode())
    return results


def _one(
    config: Config,
    segmenter: Segmenter,
    weights: Params | None,
    folder: AnyPath,
    dataset: str,
    estep: EStep,
) -> dict[str, Any]:
    """The scores of a data set, or why there are none."""
    # Each data set is evaluated as itself, whatever the weights were trained on.
    root = os.path.join(os.path.expanduser(config.data.root), dataset)
    data = dataclasses.replace(config.data, name=dataset, root=root, train_split="", mixture=())
    try:
        with together(f"the data set {dataset}"):
            facts = spec_of(PartConfig(dataset, root))
            examples = eval_examples(data, facts.eval_split, config.eval.num_images)
    except UserError as error:
        log.info("%s: not measured (%s)", dataset, error)
        return {"missing": str(error)}
    evaluator = Evaluator(segmenter, examples, config.eval, seed=config.seed)

    # All of the configuration: size, root, autoencoder and text tower count too.
    settings = [to_dict(config), dataset, str(estep), len(examples), segmenter.scale]
    identity = identity_of(weights, settings)
    name = f"{dataset}_{estep}".replace(":", "_")
    journal = Journal.shared(folder / "journal", name, identity)
    try:
        found = scores_of(evaluator, estep, journal, searched_on(data, examples))
    finally:
        journal.close()
    return {"split": examples.split, "num_images": len(examples), **found}


def scores_of(
    evaluator: Evaluator, estep: EStep, journal: Journal, training: EvalExamples | None
) -> dict[str, Any]:
    """The row of a data set: the scores of its own metric, and its label map's under every protocol."""
    examples = evaluator.examples
    fitted = calibration_lib.identity(len(examples.classes), evaluator.segmenter.scale)
    result: dict[str, Any] = {"metric": examples.metric, "absent_rule": evaluator.absent}
    protocols = evaluator.protocols if examples.metric == "miou" else (evaluator.protocol,)
    found = {
        protocol: evaluator.scores(estep, fitted, protocol=protocol, journal=journal)
        for protocol in protocols
    }
    headline = found[evaluator.protocol]
    searching = evaluator.threshold_counts(estep, training, journal) if training else []
    result |= headline.own_metric(searching) | headline.speed()
    result |= {
        "protocols": {name: s.label_map() | s.speed() for name, s in found.items()},
        "headline_protocol": evaluator.protocol,
        "miou": headline.label_map()["miou"],
        "boundary_iou": headline.boundary_iou(),
        "per_class": headline.per_class(),
    }
    if "gated" in found and (recall := found["gated"].gate_recall()):
        result["gate_recall"] = recall
    return result
