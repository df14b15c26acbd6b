# SPDX-License-Identifier: Apache-2.0
"""The paper's tables for one set of weights: --mode=eval --suite=NAME.

Every data set is looked for in config.data.root/NAME, in its official layout or as prepared shards, on
a disk or in a bucket. The table lists a missing data set as not measured. All devices and processes
share the work; a killed run continues with the image at which it was stopped.
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

# suite -> data sets, in the order of the paper's tables
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
    """Checks the name of a suite.

    Raises:
      UserError: no such suite.
    """
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
    """Scores a suite's data sets; writes FOLDER/suite_NAME.json and .md.

    Args:
      params: the weights; a killed run's journal is only continued for the same weights.
      about: origin of the weights, for suite_NAME.json.

    Returns:
      The content of suite_NAME.json.

    Raises:
      UserError: no such suite, or none of its data sets is there.
    """
    check_suite(name)

    # The headline E-Step comes first, then the sweep's. Weights are fetched once, for all journals.
    suites = SUITES if name == "all" else {name: SUITES[name]}
    esteps = [EStep(config.eval.ensemble, config.eval.steps, config.eval.spacing)]
    esteps += [e for e in map(EStep.parse, config.eval.sweep) if e not in esteps]
    weights = fetch_to_main(params)

    results: dict[str, Any] = {"suite": name, "seed": config.seed, "rows": []}
    results |= {"weights": about} if about else {}
    for suite, datasets in suites.items():
        for dataset in datasets:
            # The paper states a table of E-Steps for the semantic suite only.
            for estep in esteps if suite == "semantic" else esteps[:1]:
                row = {"suite": suite, "dataset": dataset, "estep": str(estep)}
                results["rows"].append(row | _one(config, segmenter, weights, folder, dataset, estep))

    # Nothing was measured: most likely the root is wrong.
    if all("missing" in row for row in results["rows"]):
        raise UserError(
            f"--suite={name}: no data set of it under config.data.root={config.data.root!r}; "
            f"the first: {results['rows'][0]['missing']}"
        )

    # Process 0 writes; `together` raises its error on all processes.
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
    """Scores of one data set under one E-Step, or {"missing": reason}."""
    # Evaluate the data set under its own name, whatever the weights were trained on.
    root = os.path.join(os.path.expanduser(config.data.root), dataset)
    data = dataclasses.replace(config.data, name=dataset, root=root, split="", mixture=())

    # A missing data set is a row of the table, not the end of the suite.
    try:
        with together(f"the data set {dataset}"):
            facts = spec_of(PartConfig(dataset, root))
            examples = eval_examples(data, facts.eval_split, config.eval.num_images)
    except UserError as error:
        log.info("%s: not measured (%s)", dataset, error)
        return {"missing": str(error)}
    evaluator = Evaluator(segmenter, examples, config.eval, seed=config.seed)

    # The whole configuration is part of the identity: view size, root, autoencoder and text encoder
    # change the counts as well.
    settings = [to_dict(config), dataset, str(estep), len(examples), segmenter.scale]
    settings.append(evaluator.prompts)
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
    """Row of a data set: scores of its own metric, and of its label map under every protocol.

    training: images for the threshold search of a foreground class; None for no search.
    """
    examples = evaluator.examples
    fitted = calibration_lib.identity(len(examples.classes), evaluator.segmenter.scale)
    result: dict[str, Any] = {"metric": examples.metric, "absent_rule": evaluator.absent}
    result |= evaluator.asked()

    # Protocols differ in the classes that compete for a pixel, which matters to mIoU only.
    protocols = evaluator.protocols if examples.metric == "miou" else (evaluator.protocol,)
    found = {
        protocol: evaluator.scores(estep, fitted, protocol=protocol, journal=journal)
        for protocol in protocols
    }

    # A data set's own metric is scored under the headline's protocol.
    headline = found[evaluator.protocol]
    searching = evaluator.threshold_counts(estep, training, journal) if training else []
    result |= headline.own_metric(searching) | headline.speed()

    result |= {
        "protocols": {name: {**s.label_map(), **s.speed()} for name, s in found.items()},
        "headline_protocol": evaluator.protocol,
        "miou": headline.label_map()["miou"],
        "boundary_iou": headline.boundary_iou(),
        "per_class": headline.per_class(),
    }

    # How many of the present classes gates of other sizes would have kept.
    if "gated" in found and (recall := found["gated"].gate_recall()):
        result["gate_recall"] = recall
    return result
