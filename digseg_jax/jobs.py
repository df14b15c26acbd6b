# SPDX-License-Identifier: Apache-2.0
"""The jobs behind `main`'s modes: each brings configuration, task, loop and files together."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from digseg_jax.aot.dry_run import check_evaluation
from digseg_jax.arraytypes import Params
from digseg_jax.config.parse import to_dict, with_settings
from digseg_jax.config.schema import Config, DataConfig, EvalConfig
from digseg_jax.data.sources import check_scored_splits, check_training_data
from digseg_jax.errors import UserError
from digseg_jax.evaluation import autoencoder, domains, plan
from digseg_jax.evaluation import job as evaluation
from digseg_jax.evaluation import suite as suite_lib
from digseg_jax.evaluation.tables import class_lines
from digseg_jax.evaluation.validation import make_validation, validation_examples
from digseg_jax.io.storage import AnyPath, as_path, filled_locally, local_copy, write_json
from digseg_jax.io.workdir import (
    CALIBRATION,
    CHECKPOINTS,
    CONFIG_NAME,
    EXPORT,
    claim,
    hold,
    stored_config,
)
from digseg_jax.log import log
from digseg_jax.prediction import export as exports
from digseg_jax.prediction.description import FILE as DESCRIPTION
from digseg_jax.prediction.description import (
    Description,
    check_agreement,
    describe,
    find_export,
    read_description,
)
from digseg_jax.prediction.pretrained import load_segmenter
from digseg_jax.report import build_report
from digseg_jax.report.domains import build_domain_pages
from digseg_jax.report.live import LivePage
from digseg_jax.runtime.collectives import fetch, fetch_to_main
from digseg_jax.runtime.compile_cache import use_compile_cache
from digseg_jax.runtime.distributed import is_main, together
from digseg_jax.runtime.preemption import forget_late_request
from digseg_jax.segmentation.codecs import CODECS
from digseg_jax.training.loop import Trainer
from digseg_jax.training.setup import TASKS, Setup, check_batch_size, log_summary, set_up
from digseg_jax.training.step import averaged
from digseg_jax.training.tasks.autoencoder import AutoencoderTask
from digseg_jax.training.tasks.base import Task
from digseg_jax.training.tasks.parts import provenance
from digseg_jax.training.tasks.segmentation import SegmentationTask
from digseg_jax.weights.upload import check_target


def train(config: Config, workdir: str | AnyPath, *, accept_changes: bool = False) -> None:
    """Trains a run or resumes it, exports the weights, evaluates them and builds the report.

    Args:
      workdir: the run's folder, on a disk or on gs://; a run that is there already is resumed.
      accept_changes: resume although the configuration was changed.

    Raises:
      UserError: the working directory, data, weights or devices do not fit the configuration.

    Example:
        >>> dj.train(dj.load_config("quickstart"), "runs/mine")  # doctest: +SKIP
    """
    workdir = as_path(workdir)
    with together("the data"):  # before any weights are loaded
        use_compile_cache(config.compute.compile_cache)
        check_training_data(config.data)
        if config.task == "segmentation":
            looks, best = bool(config.logging.eval_every), config.checkpoint.best
            check_scored_splits(config.data, config.eval, while_training=looks, chosen_by=best)
        elif config.task == "autoencoder":
            autoencoder.check_scored_split(config.data)
    check_batch_size(config.train.batch_size, config.compute, config.mesh)
    with exclusive_run(workdir):
        claim_workdir(workdir, to_dict(config), accept_changes)
        setup = set_up(config, TASKS[config.task])
        config, task, mesh = setup.config, setup.task, setup.mesh
        log.info("%s", plan.length(config.train, config.task, config.seed))
        if isinstance(task, SegmentationTask):
            log.info("%s", plan.cost(config.eval, config.data, config.train.batch_size, task.codec))
            check_evaluation(task, mesh, while_training=bool(config.logging.eval_every))
        log_summary(task, mesh)

        # Record revisions and checksums now, while the hub can be reached.
        described = _describe(setup)

        # Train, with an evaluation on the validation split every `logging.eval_every` steps.
        trainer = Trainer(setup, str(workdir), accept_changes=accept_changes)
        on_eval = None
        if config.logging.eval_every and isinstance(task, SegmentationTask):
            limit, best = config.logging.eval_images, config.checkpoint.best
            examples = validation_examples(config.data, config.eval, limit, best)
            on_eval = make_validation(examples, config.eval, config.seed, task, mesh, workdir)
        every, steps = config.logging.eval_every, config.train.steps
        state = trainer.run(on_eval, LivePage.of(workdir, config.data, steps, every))

        # Export the last or the best weights.
        params, source = averaged(state), f"{CHECKPOINTS}/{int(state['step'])}"
        del state  # frees the moments on the devices before the evaluation
        if config.checkpoint.best:
            params, source = trainer.weights_of(str(workdir), best=True)
            log.info("best %s: exporting %s", config.checkpoint.best, source)
        export_run(setup, params, workdir, source, described)

        # Free the trainer's frozen parts on the devices: the evaluation places its own.
        del trainer, on_eval
        if isinstance(task, SegmentationTask):
            evaluate_and_report(config.data, config.eval, config.seed, task, params, mesh, workdir)
            if left_out := plan.not_scored(config.data, workdir):
                log.info("%s", left_out)


PATIENCE = 3600.0  # seconds; weights of gigabytes go into a bucket or to a hub meanwhile
# weights can be exported on any devices, whatever the mesh and the microbatches of their training
ANY_DEVICES = {"mesh.data": -1, "mesh.fsdp": 0, "mesh.tensor": 1, "compute.accumulation": 0}


def export(
    workdir: str | AnyPath,
    config: Config | None = None,
    *,
    accept_changes: bool = False,
    hub: str = "",
) -> AnyPath:
    """Exports a run's newest checkpoint (its best with `checkpoint.best`); returns the folder.

    config: by default the configuration that the run was started with. hub: repository that receives
    the export as well, org/name or org/name@branch.

    Raises:
      UserError: there is no checkpoint, it belongs to another configuration, the run is training, or
        newer weights of it were exported already.

    Example:
        >>> dj.export("runs/mine")  # doctest: +SKIP
    """
    if hub:
        check_target(hub)
    workdir = as_path(workdir)
    with together("the run"):
        stored = stored_config(workdir) if config is None else config
        if hub and stored is not None and stored.task != "segmentation":
            raise UserError(f"--hub: for segmenters only, this run's config.task is {stored.task!r}")
        if stored is None or not (workdir / CONFIG_NAME).is_file():
            raise UserError(f"{workdir}: no run here to export; run --mode=train first")

    # A run that is still training will export newer weights, which these must not replace.
    with exclusive_run(workdir):
        claim_workdir(workdir, to_dict(stored), accept_changes)
        setup = set_up(stored if config else with_settings(stored, ANY_DEVICES), TASKS[stored.task])
        config, task = setup.config, setup.task
        trainer = Trainer(setup, str(workdir), accept_changes=accept_changes)

        params, source = trainer.weights_of(str(workdir), best=bool(config.checkpoint.best))
        if not config.checkpoint.best:  # the best weights replace any others, even newer ones
            check_not_older(workdir, source)
        with together("the calibration of the exported weights"):
            fitted = exports.fitted_there(workdir / EXPORT) if is_main() else None
        export_run(setup, params, workdir, source, _describe(setup))
        if isinstance(task, SegmentationTask):
            with together("the scores of the exported weights"):
                if is_main():
                    exports.keep_results(workdir / EXPORT, workdir / "eval" / "results.json")
                    exports.put_back(workdir / EXPORT, fitted)
    log.info("exported %s to %s", source, workdir / EXPORT)
    if hub:
        with together("the upload to the hub", PATIENCE):
            if is_main():
                pushed = exports.push_export(local_copy(workdir / EXPORT), hub)
                log.info("pushed to the hub: %s", pushed)
    return workdir / EXPORT


def check_not_older(workdir: AnyPath, source: str) -> None:
    """Raises UserError if the existing export has more training steps than the checkpoint `source`."""
    if not (workdir / EXPORT / DESCRIPTION).exists():
        return
    there = read_description(workdir / EXPORT).steps
    if there > (step := int(source.rsplit("/", 1)[-1])):
        raise UserError(
            f"{workdir / EXPORT}: holds the weights of step {there}, newer than {source}, the newest "
            f"checkpoint (step {step}); remove that folder to export older ones"
        )


def _describe(setup: Setup[Task]) -> Description | None:
    """Describes the weights that a run will have trained; None if they are no segmenter's.

    Only a segmenter's export depends on the parts of its training. Call it before the training: the hub
    may be out of reach afterwards.
    """
    if not isinstance(setup.task, SegmentationTask):
        return None
    return describe(setup.config, setup.task.abstract)


def export_run(
    setup: Setup[Task], params: Params, workdir: AnyPath, source: str, described: Description | None
) -> None:
    """Writes a run's weights to the folder where evaluation, prediction and other runs look for them.

    Args:
      params: the weights to export.
      source: path of their checkpoint; its last component is the step.
      described: as `_describe` returns it.
    """
    config, task = setup.config, setup.task
    step = source.rsplit("/", 1)[-1]
    metadata = provenance(config.task, config.seed, int(step))
    if isinstance(task, AutoencoderTask):
        export_autoencoder(config.data, task, params, workdir, metadata)
        return

    # Which checkpoint the weights are of is known only now.
    if described:
        checkpoint = f"{CHECKPOINTS}/{step}"
        described = dataclasses.replace(described, steps=int(step), checkpoint=checkpoint)
    write_export(task, params, workdir, metadata, described)


def evaluate(
    workdir: str | AnyPath,
    suite: str | None = None,
    *,
    model: str | None = None,
    config: Config | None = None,
    settings: Mapping[str, Any] | None = None,
    accept_changes: bool = False,
) -> dict[str, Any]:
    """Evaluates exported weights on their data set and builds the report, or scores a suite.

    Args:
      workdir: a run; or, with `model`, a folder for the results.
      suite: see `digseg_jax.evaluation.suite`; its data sets are looked for under data.root.
      model: weights from elsewhere, as `load_segmenter` takes them.
      config: by default the run's own, or with `model` the one that the weights describe.
      settings: other values of some of its keys, such as {"data.root": "/data"}.
      accept_changes: continue although the run's configuration was changed.

    Returns:
      The content of WORKDIR/eval/results.json, or of suite_NAME.json.

    Raises:
      UserError: no trained weights, weights of another configuration, or no data.

    Example:
        >>> once = {"eval.num_images": 1, "eval.ensemble": 1, "eval.calibrate": False, "eval.sweep": ()}
        >>> dj.evaluate("out", model="assets:segmenter", settings=once)["num_images"]
        1
    """
    forget_late_request()
    if suite is not None:
        suite_lib.check_suite(suite)
    workdir = as_path(workdir)
    # Report what is wrong before anything is loaded; a host that does not see the run tells all.
    with together("the run and its data"):
        if config is None and model is None:
            config = stored_config(workdir)
        if config is not None and config.task != "segmentation":
            raise UserError(f"--mode=eval: only for config.task='segmentation', not {config.task!r}")
        if model is None and not (workdir / EXPORT).is_dir():
            raise UserError(
                f"{workdir / EXPORT}: no trained weights; run --mode=train first, or --mode=export for "
                "the newest checkpoint of a run that is not finished"
            )
        if model is not None and (workdir / CONFIG_NAME).is_file():
            raise UserError(
                f"--workdir={workdir}: it holds a run, whose results would be replaced; choose another "
                "folder for those of --model"
            )

        # Compare the configuration with the weights' training before anything is written.
        folder = find_export(model or str(workdir / EXPORT))
        description = read_description(folder)
        settings = settings or {} if suite is None else suite_lib.used_settings(suite, settings or {})
        config = with_settings(config or description.training_config(folder), settings)
        check_agreement(description, to_dict(config), folder)
        if suite is None:
            check_scored_splits(config.data, config.eval)
        closed = CODECS[config.model.codec].closed
        answers = description.classes if closed else ()  # the only classes that a palette knows
        scored = []
        if suite is not None:
            scored = suite_lib.check_data(suite, config.data, config.eval, answers)
        use_compile_cache(config.compute.compile_cache)

    if model is None and suite is None:
        claim_workdir(workdir, to_dict(config), accept_changes, keep=True)
    segmenter = load_segmenter(folder, config)
    task, params, mesh = segmenter.task, segmenter.programs.params, segmenter.mesh
    check_evaluation(task, mesh, scored)
    if suite is None:
        scale = segmenter.scale
        del segmenter  # frees its frozen parts on the devices: the evaluation places its own
        return evaluate_and_report(
            config.data, config.eval, config.seed, task, params, mesh, workdir,
            description=description, own=model is None, scale=scale,
        )  # fmt: skip

    folder, about = workdir / "eval", description.provenance()
    results = suite_lib.run_suite(
        config.data, config.eval, config.seed, segmenter, params, folder, suite, to_dict(config), about,
        answers,
    )  # fmt: skip
    log.info("suite %s: %s", suite, folder / f"suite_{suite}.md")
    with together("the pages of the suite"):
        if suite == domains.SUITE and is_main():
            log.info("pages: %s", build_domain_pages(folder))
        if is_main() and (folder / "results.json").exists():  # the report shows suites, too
            log.info("report: %s", build_report(workdir))
    return results


@contextlib.contextmanager
def exclusive_run(workdir: AnyPath) -> Iterator[None]:
    """Holds the lock of `workdir` during the block, so that no other run trains there.

    Raises:
      UserError: on every process, if another run trains there.
    """
    with contextlib.ExitStack() as stack:
        with together("the lock of the working directory"):
            if is_main():
                stack.enter_context(hold(workdir))
        yield


def claim_workdir(
    workdir: AnyPath, values: dict[str, Any], accept_changes: bool, *, keep: bool = False
) -> None:
    """Claims the working directory on process 0, and checks that all processes see it.

    keep: a configuration that is stored there stays as it is.

    Raises:
      UserError: on every process: the error of process 0, or that a process cannot see the directory.
    """
    with together("the working directory"):
        if is_main():
            claim(workdir, values, accept_changes=accept_changes, keep=keep)

    with together("a look at the working directory"):
        if not (workdir / CONFIG_NAME).exists():
            raise UserError(
                f"--workdir={workdir}: process 0 wrote {CONFIG_NAME} there, this process does not see "
                "it; use storage that all hosts share, such as gs://"
            )


def write_export(
    task: Task,
    params: Params,
    workdir: AnyPath,
    metadata: dict[str, str],
    description: Description | None = None,
) -> None:
    """Writes DIR/export on process 0; every process must call it."""
    # Collective: sharded leaves are gathered from all processes.
    whole = fetch_to_main(params)
    with together("the exported weights", PATIENCE):
        if is_main():
            with filled_locally(workdir / EXPORT) as folder:
                task.export(whole, folder, metadata)
                if description:
                    exports.complete_export(folder, description)

                # A calibration there was fitted to the weights that are now replaced; exports of older
                # versions kept their weights beside it.
                for name in (CALIBRATION, *(exports.OLD_WEIGHTS if description else ())):
                    (workdir / EXPORT / name).unlink(missing_ok=True)


def evaluate_and_report(
    data: DataConfig,
    settings: EvalConfig,
    seed: int,
    task: SegmentationTask,
    params: Params,
    mesh: Mesh,
    workdir: AnyPath,
    *,
    description: Description | None = None,
    own: bool = True,
    scale: float | None = None,
) -> dict[str, Any]:
    """Evaluates, writes the report, and logs the mIoU and the report's path; returns the results.

    description: of the weights; by default of the run's export. own: whether they are that export.
    scale: that an earlier evaluation has fitted for them; None: not known.
    """
    description = description or read_description(workdir / EXPORT)
    about, templates = description.provenance(), description.templates
    results = evaluation.evaluate(
        data, settings, seed, task, params, mesh, workdir, about, templates, scale
    )

    page = workdir
    with together("the report"):
        if is_main():
            # Prediction reads the calibration beside the weights.
            if own:
                exports.add_results(workdir / EXPORT, results)
            page = build_report(workdir)

    log.info("IoU by class, percent:\n%s", class_lines(results["per_class"]))
    scores = [float("nan") if results[key] is None else results[key] for key in ("miou", "accuracy")]
    facts = [*scores, results["num_images"], results["split"], page]
    log.info("mIoU %.3f, accuracy %.3f on %d held-out images (%s); report: %s", *facts)
    return results


def export_autoencoder(
    data: DataConfig, task: AutoencoderTask, params: Params, workdir: AnyPath, metadata: dict[str, str]
) -> dict[str, Any]:
    """Measures the latent scale and writes DIR/export; then the round trip, written to DIR/eval.

    metadata: of the exported weights.
    """
    # An autoencoder fits into the host's memory; every process measures by itself.
    params = jax.tree.map(fetch, params)

    # Diffusion needs latents of unit variance: the scale goes into the exported config.
    factor = task.config.factor
    scaling = autoencoder.measure_scaling(task.graphdef, params, data, factor)
    task.config = dataclasses.replace(task.config, scaling_factor=scaling)
    write_export(task, params, workdir, metadata)

    # The weights are safe by now, whatever the scoring meets; its score is then added to them.
    results = autoencoder.round_trip(task.graphdef, params, data, factor)
    log.info("round trip on held-out images: %s", json.dumps(results))
    with together("the results"):
        if is_main():
            write_json(workdir / "eval" / "results.json", results)
    score = {"round_trip_mask_iou": f"{results['mask_iou']:.4f}"}
    write_export(task, params, workdir, metadata | score)
    return results
