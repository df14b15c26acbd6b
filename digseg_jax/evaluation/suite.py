# SPDX-License-Identifier: Apache-2.0
"""The paper's tables, or the generalist's domains, for one set of weights: --mode=eval --suite=NAME.

Every data set is looked for in config.data.root/NAME, in its official layout or as prepared shards, on
a disk or in a bucket. Tables of the paper are scored on the split of its tables, domains
(`evaluation.domains`) on config.eval.split. The table lists a missing data set as not measured. All
devices and processes share the work; a killed run continues with the image at which it was stopped.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from digseg_jax.arraytypes import Params
from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import DataConfig, EvalConfig, PartConfig
from digseg_jax.data.datasets.domains import DOMAINS
from digseg_jax.data.shards.fingerprint import StaleShards
from digseg_jax.data.sources import spec_of
from digseg_jax.errors import Transient, UserError
from digseg_jax.evaluation import domains
from digseg_jax.evaluation.evaluator import Evaluator
from digseg_jax.evaluation.examples import EvalExamples, eval_examples
from digseg_jax.evaluation.gallery import Shown
from digseg_jax.evaluation.job import model_facts, searched_on
from digseg_jax.evaluation.journal import Journal, identity_of
from digseg_jax.evaluation.scores import Scores
from digseg_jax.evaluation.suite_tables import table
from digseg_jax.io.storage import AnyPath, as_path, is_remote, write_bytes, write_json
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
GALLERY = 8  # images shown of each domain
ESTEPS = ("semantic", "all")  # suites with several E-Steps: the paper has them for this table only
NAMES = (*SUITES, domains.SUITE, "all")  # all: the tables of the paper


def check_suite(name: str) -> None:
    """Checks the name of a suite.

    Raises:
      UserError: no such suite.
    """
    if name not in NAMES:
        raise UserError(f"--suite={name}: legal values are {', '.join(NAMES)}")


def used_settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a user gave for a suite, without a calibration, which no suite makes.

    Logs in one line those that this suite does not use.
    """
    unused = {"eval.calibrate_split", "eval.calibrate_images", "data.name", "data.split"}
    unused |= set() if name in ESTEPS else {"eval.sweep"}
    unused |= set() if name == domains.SUITE else {"eval.split"}
    unused |= {"eval.calibrate"} if given.get("eval.calibrate") else set()
    if told := [f"config.{key}" for key in given if key in unused]:
        log.info("--suite=%s does not use %s", name, ", ".join(told))
    return {**given, "eval.calibrate": False}


def check_data(
    name: str, data: DataConfig, settings: EvalConfig, answers: Sequence[str] = ()
) -> list[EvalExamples]:
    """Opens every data set of a suite before anything is loaded; returns those that can be scored.

    answers: classes of weights that answer no others, a palette's; () of weights that take any words.

    Raises:
      UserError: no such folder (unchecked, the suite of the domains would score the land cover alone,
        which needs no data), none of the suite's data sets in it, or shards older than their files.
    """
    root = data.root
    if root and not is_remote(root) and not as_path(root).is_dir():
        raise UserError(f"--suite={name}: config.data.root={root!r}: no such folder")

    # Rows that differ in their E-Step have the same data.
    missing, there = [], []
    for subject in {row.name: row for row in _subjects(data, settings, name)}.values():
        try:
            there.append(_answerable(subject.examples(), answers))
        except (StaleShards, Transient):
            raise
        except UserError as error:
            missing.append(str(error))
    if not there:
        raise _nothing_there(name, root, missing[0])
    return there


def _nothing_there(name: str, root: str, first: str) -> UserError:
    """The error of a suite without data: most likely the root is wrong. first: what is missing."""
    return UserError(
        f"--suite={name}: no data set of it under config.data.root={root!r} can be scored; the first: "
        f"{first}"
    )


def _answerable(examples: EvalExamples, answers: Sequence[str]) -> EvalExamples:
    """The examples, if the weights answer just the classes that are asked for.

    Raises:
      UserError: they answer others, or in another order: their masks would count for wrong classes.
    """
    if not answers:
        return examples

    # A palette has a color for every class, one for what is none of the others among them.
    own = [name.lower() for name in answers]
    if [name.lower() for name in examples.classes] != own:
        differs = [name for name in examples.classes if name.lower() not in own]
        more = f", which lack {', '.join(differs[:3])}" if differs else ", in their own order"
        raise UserError(
            f"these weights answer their own {len(answers)} classes alone{more}; a palette is scored "
            "on the data set that it was trained on"
        )
    return examples


def run_suite(
    data: DataConfig,
    settings: EvalConfig,
    seed: int,
    segmenter: Segmenter,
    params: Params,
    folder: AnyPath,
    name: str,
    values: dict[str, Any],
    about: dict[str, Any] | None = None,
    answers: Sequence[str] = (),
) -> dict[str, Any]:
    """Scores a suite's data sets; writes FOLDER/suite_NAME.json and .md.

    Of domains, images, truth and masks are written too, to FOLDER/domains/NAME.

    Args:
      data: where the data sets are, and how images are scaled.
      settings, seed: how they are scored, and the seed of the initial noise.
      params: the weights.
      values: of the whole configuration: a killed run's journal is only continued for equal values and
        weights.
      about: origin of the weights, for suite_NAME.json.
      answers: see `check_data`.

    Returns:
      The content of suite_NAME.json.

    Raises:
      UserError: no such suite, or none of its data sets is there.
    """
    check_suite(name)

    # Weights are fetched once, for all journals.
    weights = fetch_to_main(params)
    results: dict[str, Any] = {"suite": name, "seed": seed, "rows": []}
    results |= {"weights": about} if about else {}
    values = values | {"model": model_facts(values.get("model", {}), about)}
    for subject in _subjects(data, settings, name):
        row: dict[str, Any] = {"suite": subject.suite, "dataset": subject.name}
        row |= {"estep": str(subject.estep)} | ({"unlisted": True} if subject.unlisted else {})
        row |= _one(subject, segmenter, settings, seed, values, weights, folder, answers)
        results["rows"].append(row)

    if all("missing" in row for row in results["rows"]):
        raise _nothing_there(name, data.root, results["rows"][0]["missing"])

    # Process 0 writes; `together` raises its error on all processes.
    with together("the files of the suite"):
        if is_main():
            write_json(folder / f"suite_{name}.json", results)
            write_bytes(folder / f"suite_{name}.md", table(results).encode())
    return results


@dataclasses.dataclass(frozen=True)
class _Subject:
    """A row of a suite before it is scored: a data set under one E-Step.

    examples: opens the split; raises UserError. training: of those examples, the images for a threshold
    search. facts: JSON-ready, what else changes the counts. shown: images of its gallery. unlisted: a
    folder of the user's own among the domains.
    """

    suite: str
    name: str
    estep: EStep
    examples: Callable[[], EvalExamples]
    training: Callable[[EvalExamples], EvalExamples | None] = lambda examples: None
    facts: Any = None
    shown: int = 0
    unlisted: bool = False


def _subjects(data: DataConfig, settings: EvalConfig, name: str) -> Iterator[_Subject]:
    """Yields the rows of a suite, not scored yet, in the table's order."""
    esteps = [EStep(settings.ensemble, settings.steps, settings.spacing)]
    if name == domains.SUITE:
        split, count = settings.split, settings.num_images
        for domain in domains.domains_below(data.root):
            opened = partial(domains.domain_examples, domain, data.root, split, count)
            facts = domains.describe_domain(domain)
            row = _Subject(name, domain.name, esteps[0], opened, facts=facts, shown=GALLERY)
            yield dataclasses.replace(row, unlisted=domain not in DOMAINS)
        return

    # Each data set under its own name, whatever the weights were trained on.
    esteps += [e for e in map(EStep.parse, settings.sweep) if e not in esteps]
    for suite, datasets in (SUITES if name == "all" else {name: SUITES[name]}).items():
        for dataset in datasets:
            root = os.path.join(os.path.expanduser(data.root), dataset)
            own = dataclasses.replace(data, name=dataset, root=root, split="", mixture=())
            opened = partial(_paper_examples, own, settings.num_images)

            # The headline E-Step first, then the sweep's.
            for estep in esteps if suite in ESTEPS else esteps[:1]:
                search = partial(searched_on, own)
                yield _Subject(suite, dataset, estep, opened, training=search)


def _paper_examples(data: DataConfig, num_images: int) -> EvalExamples:
    """Opens the split of a data set that the paper's tables use; raises UserError without it."""
    return eval_examples(data, spec_of(PartConfig(data.name, data.root)).eval_split, num_images)


def _one(
    subject: _Subject,
    segmenter: Segmenter,
    settings: EvalConfig,
    seed: int,
    values: dict[str, Any],
    weights: Params | None,
    folder: AnyPath,
    answers: Sequence[str] = (),
) -> dict[str, Any]:
    """Scores of one data set under one E-Step, or {"missing": reason}.

    values: the configuration, for the journal's identity. answers: see `check_data`.
    """
    # A missing data set is a row of the table, not the end of the suite.
    try:
        with together(f"the data set {subject.name}"):
            examples = _answerable(subject.examples(), answers)
    except Transient:  # the data may be there: to be started again
        raise
    except UserError as error:
        log.info("%s: not measured (%s)", subject.name, error)
        return {"missing": str(error)}
    if examples.short_side is not None:
        segmenter = segmenter.seen_at(examples.short_side)
    evaluator = Evaluator(segmenter, examples, settings, seed=seed)
    log.info("%s: %d images of %s", subject.name, len(examples), examples.split)

    # The whole configuration is part of the identity: view size, root, autoencoder and text encoder
    # change the counts as well. So do the images and masks.
    training = subject.training(examples)
    facts = [values, subject.name, str(subject.estep), len(examples)]
    facts += [segmenter.scale, evaluator.prompts, *filter(None, [subject.facts])]
    facts += [split.digest() for split in (examples, training) if split]
    identity = identity_of(weights, facts)
    name = f"{subject.name}_{subject.estep}".replace(":", "_")
    journal = Journal.shared(folder / "journal", name, identity)
    shown = Shown(subject.shown, len(examples), folder / "journal" / f"{name}_masks")
    try:
        found, headline = scores_of(evaluator, subject.estep, journal, training, shown)
    finally:
        journal.close()

    if shown.wanted:
        shown.write(folder / subject.suite / subject.name, examples, headline)
    return {"split": examples.split, "num_images": len(examples), **found}


def scores_of(
    evaluator: Evaluator,
    estep: EStep,
    journal: Journal,
    training: EvalExamples | None,
    shown: Shown | None = None,
) -> tuple[dict[str, Any], Scores]:
    """Row of a data set: scores of its own metric, and of its label map under every protocol.

    Args:
      evaluator: of the data set.
      estep: members and steps.
      journal: counts of an earlier, killed run; receives those of every image.
      training: images for the threshold search of a foreground class; None for no search.
      shown: the gallery's choice of images.

    Returns:
      The row, and the scores under the headline's protocol.
    """
    examples = evaluator.examples
    fitted = calibration_lib.identity(len(examples.classes), evaluator.segmenter.scale)
    result: dict[str, Any] = {"metric": examples.metric, "absent_rule": evaluator.absent}
    result |= evaluator.asked()

    # Protocols differ in the classes that compete for a pixel, which matters to mIoU only.
    protocols = evaluator.protocols if examples.metric == "miou" else (evaluator.protocol,)
    found = {
        protocol: evaluator.scores(
            estep,
            fitted,
            protocol=protocol,
            journal=journal,
            shown=shown if protocol == evaluator.protocol else None,
        )
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

    # What is covered by masks of names that no image can show; a palette is not asked for others.
    if examples.wrong_names and not evaluator.codec.closed:
        result["wrong_names"] = evaluator.coverage(examples.wrong_names, estep, journal)

    # How many of the present classes gates of other sizes would have kept.
    if "gated" in found and (recall := found["gated"].gate_recall()):
        result["gate_recall"] = recall
    return result, headline
