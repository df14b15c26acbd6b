# SPDX-License-Identifier: Apache-2.0
"""Evaluation of a data set: scores, E-Step table and gallery, and the files that hold them."""

from __future__ import annotations

import dataclasses
import datetime
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from digseg_jax.arraytypes import Params
from digseg_jax.config.parse import to_dict
from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import DataConfig, EvalConfig
from digseg_jax.data.datasets.registry import title
from digseg_jax.data.sources import scored_part, spec_of
from digseg_jax.errors import Transient, UserError
from digseg_jax.evaluation import fitting
from digseg_jax.evaluation.evaluator import Evaluator
from digseg_jax.evaluation.examples import EvalExamples, eval_examples
from digseg_jax.evaluation.gallery import IMAGES, Shown
from digseg_jax.evaluation.journal import Journal, identity_of
from digseg_jax.evaluation.scores import COUNTED, Scores
from digseg_jax.evaluation.tables import results_markdown
from digseg_jax.io.storage import AnyPath, explained, write_bytes, write_json
from digseg_jax.log import log
from digseg_jax.prediction.description import installed_versions
from digseg_jax.prediction.segmenter import Segmenter
from digseg_jax.runtime.collectives import fetch_to_main
from digseg_jax.runtime.distributed import is_main, together
from digseg_jax.segmentation import calibration as calibration_lib
from digseg_jax.segmentation.calibration import Calibration
from digseg_jax.training.tasks.segmentation import SegmentationTask

UNFINISHED = "unfinished"  # folder with the counts and masks of an evaluation that has not ended


def evaluate(
    data: DataConfig,
    settings: EvalConfig,
    seed: int,
    task: SegmentationTask,
    params: Params,
    mesh: Mesh,
    workdir: AnyPath,
    about: dict[str, Any] | None = None,
    templates: Sequence[str] = (),
    scale: float | None = None,
) -> dict[str, Any]:
    """Scores weights; writes DIR/eval/{results.json, results.md, speed.json, estep.json, gallery/}.

    A killed evaluation continues where it stopped when the same one is started again, and ends with the
    same results.json; times and what else differs from run to run are in speed.json.

    Args:
      data, settings: what is scored, and how.
      seed: of the initial noise.
      about: origin of the weights; goes into results.json.
      templates: prompts of the weights' training; by default those of the configuration's data sets.
      scale: of the mask scores, if none is fitted: what an earlier evaluation fitted for the weights.

    Returns:
      The content of results.json.

    Raises:
      UserError: no such data set, split or folder, or a file that cannot be written.
    """
    # Open every split before the first image is segmented, so that a missing one is reported early.
    scales = {} if scale is None or settings.calibrate else {"scale": scale}
    segmenter = Segmenter(task, params, settings, mesh=mesh, templates=templates, **scales)
    examples = eval_examples(data, settings.split, settings.num_images)
    evaluator = Evaluator(segmenter, examples, settings, seed=seed)
    training = searched_on(data, examples)
    fitted_on = calibrated_on(data, settings)
    _tell_scale(data, examples, evaluator)
    estep = EStep(settings.ensemble, settings.steps, settings.spacing)
    if fitted_on:
        _tell_fit(evaluator, estep, fitted_on)

    # Counts are only continued for the same weights, model, data, settings and seed.
    folder = workdir / "eval"
    identity = identity_of(
        fetch_to_main(params),
        model_facts(to_dict(task.config.model), about),
        to_dict(data),
        to_dict(settings),
        seed,
        [split.digest() for split in (examples, training, fitted_on) if split],
        len(examples),
        evaluator.prompts,
        segmenter.scale,
    )
    journal = Journal.shared(folder / UNFINISHED, "counts", identity)
    shown = Shown(IMAGES, len(examples), folder / UNFINISHED)

    def scored(estep: EStep, shown: Shown | None = None) -> tuple[Scores, Calibration]:
        """Scores of one E-Step with its own calibration; a shared one would favor the fitted E-Step."""
        fitted = _calibration(evaluator, estep, fitted_on, journal)
        return evaluator.scores(estep, fitted, journal=journal, shown=shown), fitted

    # The headline E-Step is shown in the gallery; the sweep only gives rows of a table.
    scores, fitted = scored(estep, shown)
    searching = evaluator.threshold_counts(estep, training, journal, fitted.scale) if training else []
    results = results_of(scores, evaluator, data.name, fitted, estep, searching)
    results |= {"weights": about} if about else {}
    results |= folder_title(data)
    if fitted_on:
        facts = {"images": len(fitted_on), "split_images": len(fitted_on.source)}
        results |= {f"calibration_{name}": count for name, count in facts.items()}
    rows = [estep_row(row, *scored(row)) for row in map(EStep.parse, settings.sweep)]

    # The journal goes last: until the files are written, a killed run can still make them from it.
    with together("the files of the evaluation"):
        if is_main():
            about_run = _circumstances(mesh)
            _write_files(folder, results, rows, scores, about_run)
    shown.write(folder / "gallery", examples, scores)
    journal.close()
    with together("the end of the evaluation"):
        if is_main():
            _remove(folder / UNFINISHED)
    return results


def results_of(
    scores: Scores,
    evaluator: Evaluator,
    dataset: str,
    calibration: Calibration,
    estep: EStep,
    searching: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Content of results.json; scores are unrounded shares (0..1), nan is written as null."""
    settings = evaluator.settings
    return {
        # what was evaluated, and by which rules
        "dataset": dataset,
        "split": settings.split,
        "protocol": f"{dataset}: held-out images, counts pooled over the split, mean over "
        f"{COUNTED[scores.absent_rule]}, {scores.protocol} queries",
        "num_images": len(scores.rows),
        "split_images": len(evaluator.examples.source),
        "absent_rule": scores.absent_rule,
        "codec": evaluator.segmenter.codec.name,
        "ensemble_rule": settings.ensemble_rule,
        "decoder": settings.decoder,
        "decode_limit": settings.decode_limit,
        **evaluator.asked(),
        # scores of the label map, 0..1
        **scores.label_map(),
        "per_class": scores.per_class(),
        "boundary_iou": scores.boundary_iou(),
        # sampling and calibration
        "ensemble": estep.ensemble,
        "steps": estep.steps,
        "spacing": estep.spacing,
        "seed": evaluator.seed,
        "calibration": calibration.to_dict(),
        # queries: the classes, and the texts that the text encoder read
        "queries": list(evaluator.queries),
        "prompts": list(evaluator.prompts),
        # the data set's own metric, the counts, and scores of single queries
        "metric": evaluator.examples.metric,
        "own_metric": scores.own_metric(searching or ()),
        "confusion": scores.confusion.tolist(),
        **scores.single_queries(),
    }


def folder_title(data: DataConfig) -> dict[str, str]:
    """Which of several folders of a layout is scored, for results.json; empty for another data set."""
    part = scored_part(data)
    shown = part.folder or title(part.name, part.root)
    return {} if shown == data.name else {"title": shown}


def model_facts(model: Mapping[str, Any], about: Mapping[str, Any] | None) -> dict[str, Any]:
    """What changes a model's counts beside the U-Net's weights: its settings, and its frozen parts.

    Parts are told by the checksums in the origin of the weights, not by their places: those of an
    export in a bucket are read from a copy, which lies elsewhere at every start.
    """
    places = ("vae", "unet", "text", "unet_text")
    settings = {key: value for key, value in model.items() if key not in places}
    return settings | {"parts": (about or {}).get("parts")}


def estep_row(estep: EStep, scores: Scores, calibration: Calibration) -> dict[str, Any]:
    """Row of the E-Step table: sampling, mIoU (0..1), queries per second and calibration."""
    return {
        **dataclasses.asdict(estep),
        "miou": scores.miou,
        "queries_per_second": scores.speed()["queries_per_second"],
        "calibration": calibration.to_dict(),
    }


def calibrated_on(data: DataConfig, settings: EvalConfig) -> EvalExamples | None:
    """Examples for fitting scale and biases; None if config.eval.calibrate is off."""
    if not settings.calibrate:
        return None
    count = settings.calibrate_images or settings.num_images
    return eval_examples(data, settings.calibrate_split, count)


def searched_on(data: DataConfig, examples: EvalExamples) -> EvalExamples | None:
    """Training images for searching the threshold of a foreground class.

    None for another metric, or if there is no training split apart from the scored one: then only the
    default threshold is reported.
    """
    if examples.metric != "foreground":
        return None
    try:
        with together("the training images of a threshold search"):
            split = data.split or spec_of(scored_part(data)).train_split
            return None if split == examples.split else eval_examples(data, split)
    except Transient:
        raise
    except UserError as error:
        log.info("%s: no threshold search (%s)", data.name, error)
        return None


def _tell_scale(data: DataConfig, examples: EvalExamples, evaluator: Evaluator) -> None:
    """Logs the scale at which the first image is seen; warns if training never saw that scale."""
    with together("the first image"):
        height, width = examples[0]["image"].shape[:2]

    # Windows keep the image's scale or its configured short side; "whole" squeezes it into one view.
    segmenter = evaluator.segmenter
    if evaluator.mode == "window":
        side = segmenter.short_side or min(height, width)
    else:
        side = min(segmenter.size)
    log.info(
        "evaluation: %s, views of %dx%d, an image of %dx%d is seen with a short side of %d pixels",
        evaluator.mode, *segmenter.size, height, width, side,
    )  # fmt: skip

    # Scale in the unit of the training crops: relative to the crop's size, or to the image's own size.
    # A part of a mixture may have a unit and a range of its own.
    part = scored_part(data)
    unit = data.image_size if data.scale_unit == "short_side" else min(height, width)
    scale = side / (part.short_side or unit)
    least, most = part.scale_min or data.scale_min, part.scale_max or data.scale_max
    if not least <= scale <= most:
        log.warning(
            "evaluation at scale %.2f, trained from %.2f to %.2f: set config.eval.short_side nearer to "
            "%d, scale 1 of the training",
            scale, least, most, part.short_side or unit,
        )  # fmt: skip


def _tell_fit(evaluator: Evaluator, estep: EStep, fitted_on: EvalExamples) -> None:
    """Logs what a calibration will be fitted to."""
    if evaluator.fits:
        chosen, pixels = evaluator.fitted_to(estep, fitted_on)
        log.info(
            "calibration of %s: on %d of %d images of %s, every %dth pixel in both axes and at most %d "
            "of an image, so that the mask scores stay below %d MiB",
            estep, len(chosen), len(fitted_on), fitted_on.split, fitting.STRIDE, pixels,
            fitting.EVIDENCE // 2**20,
        )  # fmt: skip


def _calibration(
    evaluator: Evaluator, estep: EStep, fitted_on: EvalExamples | None, journal: Journal
) -> Calibration:
    """Scale and biases of an E-Step, fitted once and kept in the journal.

    Without `fitted_on`: the identity, the segmenter's own scale and no biases.
    """
    if fitted_on is None:
        classes = len(evaluator.examples.classes)
        return calibration_lib.identity(classes, evaluator.segmenter.scale)
    key = f"calibration {estep}"
    if key not in journal:
        journal.add(key, evaluator.calibrate(estep, fitted_on).to_dict())
    fitted = Calibration.from_dict(journal[key])
    log.info(
        "calibration of %s, fitted on %s: scale %.2f, biases of the %d classes %.2f to %.2f",
        estep, fitted.split, fitted.scale, len(fitted.bias), min(fitted.bias), max(fitted.bias),
    )  # fmt: skip
    return fitted


def _write_files(
    folder: AnyPath,
    results: dict[str, Any],
    rows: list[dict[str, Any]],
    scores: Scores,
    circumstances: dict[str, Any],
) -> None:
    """Writes the results and their tables to `folder`.

    circumstances: entries of speed.json, beside the speed.
    """
    write_json(folder / "results.json", results)
    write_bytes(folder / "results.md", results_markdown(results).encode())
    write_json(folder / "speed.json", scores.speed() | circumstances)
    if rows:
        note = f"Measured by this run on the {results['split']} split of {results['dataset']}."
        write_json(folder / "estep.json", {"rows": rows, "note": note})
    else:  # a table of an earlier evaluation is not of these results
        with explained(folder / "estep.json", "cannot be removed"):
            epath.Path(folder / "estep.json").unlink(missing_ok=True)


def _circumstances(mesh: Mesh) -> dict[str, Any]:
    """Date, devices, versions and command of this program's run."""
    devices = list(mesh.devices.flat)
    program = "digseg" if Path(sys.argv[0]).name in ("digseg", "main.py") else sys.argv[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(" ", "minutes"),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
        "versions": {"python": platform.python_version(), **installed_versions()},
        "command": shlex.join([program, *sys.argv[1:]]),
    }


def _remove(folder: AnyPath) -> None:
    """Removes a folder with its content, if it exists."""
    with explained(folder, "cannot be removed"):
        epath.Path(folder).rmtree(missing_ok=True)
