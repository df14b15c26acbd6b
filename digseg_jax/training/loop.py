# SPDX-License-Identifier: Apache-2.0
"""The training loop, the same for every task: next batch, step, log, evaluate, save."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from digseg_jax import assets
from digseg_jax.arraytypes import Batch, Params
from digseg_jax.config.parse import to_dict
from digseg_jax.data.pipeline import training_stream
from digseg_jax.data.sources import training_examples
from digseg_jax.data.stream import Batches
from digseg_jax.errors import Preempted, UserError
from digseg_jax.io.checkpoint import Checkpointer, abstract_with_shardings
from digseg_jax.io.metric_writer import MetricWriter, require_wandb
from digseg_jax.io.storage import as_path, explained
from digseg_jax.log import heartbeat, log
from digseg_jax.runtime.collectives import check_all_agree
from digseg_jax.runtime.distributed import barrier
from digseg_jax.runtime.preemption import PreemptionWatch
from digseg_jax.runtime.profiling import ProfilerWindow
from digseg_jax.runtime.sharding import (
    check_batch,
    data_share,
    describe_memory,
    infer_shardings,
    place,
    place_ahead,
)
from digseg_jax.training.example_log import ExampleLog
from digseg_jax.training.failure import REPLAY, save_failure
from digseg_jax.training.flops import step_flops
from digseg_jax.training.optim import check_freeze, make_optimizer
from digseg_jax.training.setup import Setup
from digseg_jax.training.step import TrainState, abstract_state, initial_state, make_train_step
from digseg_jax.training.tasks.base import Task
from digseg_jax.training.tasks.latents import check_cache, check_cached_colors
from digseg_jax.training.tasks.segmentation import SegmentationTask
from digseg_jax.training.train_log import NotFinite, TrainLog
from digseg_jax.weights import resolve
from digseg_jax.weights.scheduler import schedule_differences

COMPILE_TIMEOUT = 3600.0  # seconds that the first process to have compiled waits for the last


class Trainer:
    """A training run in a working directory: builds or restores the state, trains to the last step."""

    def __init__(self, setup: Setup[Task], workdir: str, *, accept_changes: bool = False):
        config, task, mesh = setup.config, setup.task, setup.mesh
        self.config, self.task, self.mesh, self.workdir = config, task, mesh, workdir
        self.accept_changes = accept_changes
        train = config.train

        # Bad input is answered before anything is placed on a device.
        require_wandb(config.logging.wandb)
        check_freeze(task.abstract, config.optim.freeze)
        if config.data.latent_cache and isinstance(task, SegmentationTask):
            task.prepare()
            check_cache(task, config.data, config.model, colors=False)  # `start_state` knows the colors
        if config.optim.new_lr_scale != 1 and not task.new:
            log.warning(
                "config.optim.new_lr_scale=%g changes nothing: %s lacks no parameter of this network",
                *(config.optim.new_lr_scale, config.model.unet),
            )

        # Shapes and shardings of the state; the state itself is made or restored by `start_state`.
        abstract = abstract_state(task.abstract, config.optim)
        self.state_shardings = infer_shardings(abstract, mesh)
        self.abstract_state = abstract_with_shardings(abstract, self.state_shardings)

        # Frozen parts (autoencoder, text embeddings) never change: placed once, passed to every step.
        frozen_shardings = infer_shardings(task.frozen, mesh)
        self.frozen = place(task.frozen, frozen_shardings)
        log.info("state: %s", describe_memory(abstract, self.state_shardings))
        self.step_fn = make_train_step(
            task, mesh, self.state_shardings, frozen_shardings, config.optim,
            steps=train.steps, seed=config.seed, accumulation=config.compute.accumulation,
        )  # fmt: skip

    def start_state(self, checkpointer: Checkpointer) -> tuple[int, TrainState]:
        """Restores the run's newest checkpoint, or else makes the state of step 0.

        The parameters of step 0 come from the run that `config.init_from` names, or else are pretrained
        or random, as the configuration says.

        Returns:
          The number of finished steps, and the sharded state.

        Raises:
          UserError: the checkpoint cannot be used, or was trained with another vocabulary.
        """
        if checkpointer.latest_step() is not None:
            step, state, meta = checkpointer.restore(self.abstract_state)
            self._check_vocabulary(meta.get("vocabulary", self.vocabulary))
            self._check_examples(meta.get("examples", {}))
            if (differs := self._take_constants(meta)) and not self.accept_changes:
                raise UserError(
                    f"{self.workdir}: its checkpoint was trained with other colors ({differs}); "
                    "--accept_changes continues with new ones"
                )
            self._check_cached_colors()
            log.info("start: resumed from %s at step %d", checkpointer.folder, step)
            return step, state

        # Only the weights are taken over from another run; its moments and step count are not.
        if self.config.init_from:
            params, source = self.weights_of(self.config.init_from)
            self._check_cached_colors()
        else:
            self._check_cached_colors()
            params, source = self._initial_params()

        # Under jit with output shardings the optimizer's
        # moments are born sharded, never whole on one device.
        make = jax.jit(self._initial_state, out_shardings=self.state_shardings)
        log.info("start: step 0, from %s", source)
        return 0, make(params)

    def _check_cached_colors(self) -> None:
        """Raises UserError if cached latents were made with other colors than the run now has."""
        if self.config.data.latent_cache and isinstance(self.task, SegmentationTask):
            check_cached_colors(self.task, self.config.data)

    def weights_of(self, workdir: str, *, best: bool = False) -> tuple[Params, str]:
        """Loads the weights of a run's newest (or best) checkpoint, averaged if it has averages.

        The task takes over the constants that they were trained with, such as the colors of a palette,
        unless its own have another form: then the weights are a start for other classes.

        Returns:
          The sharded parameters, and the path that they came from.

        Raises:
          UserError: there is no checkpoint, or it is one of another model.
        """
        # create=False: reading from a mistyped folder must not create it.
        with Checkpointer(workdir, self.config.checkpoint, create=False) as other:
            step = other.best_step() if best else other.latest_step()
            if step is None and best and (step := other.latest_step()) is not None:
                measure = self.config.checkpoint.best
                log.warning("%s: none has a %s; the newest is taken", other.folder, measure)
            if step is None:
                raise UserError(f"{other.folder}: no checkpoint here to start from")

            # The other run may keep averages where this one does not, or the other way round.
            stored = other.entries(step) or tuple(self.abstract_state)
            name = "ema" if "ema" in stored else "params"
            part = other.restore_part({name: self.abstract_state["params"]}, step)
            meta = other.read_meta(step)

        self._take_constants(meta)
        return part[name], f"{other.folder / str(step)}"

    def _take_constants(self, meta: dict[str, Any]) -> str:
        """Takes over the task's constants from a checkpoint's `meta`, unless they do not fit this run.

        Found anew, on other hardware, colors could differ from those that the weights paint. Those of
        another autoencoder, or another number of them, do not fit: the run then keeps its own.

        Returns:
          Why they do not fit; "" if they do, or there are none.
        """
        constants, vae = meta.get("constants") or {}, self.config.model.vae
        if not constants:
            return ""

        differs, theirs = "", meta.get("config", {}).get("model", {}).get("vae", vae)
        if theirs != vae:
            differs = f"config.model.vae={theirs!r}, now {vae!r}"
        elif _shapes(constants) != _shapes(self.task.constants()):
            differs = "another number of classes or names, or another config.model.codec"
        if differs:
            log.warning("colors: new ones, not those of the weights (%s)", differs)
        else:
            self.task.restore_constants(constants)
        return differs

    def _initial_params(self) -> tuple[Params, str]:
        """Parameters of step 0, sharded, and the words by which the log names their source."""
        model = self.config.model
        pretrained = self.config.task == "segmentation" and model.unet_init == "pretrained"
        source = f"the pretrained {model.unet}" if pretrained else "random weights"

        # Another target or schedule than the checkpoint's is legal, but has to be learned first.
        if pretrained:
            folder = resolve(assets.resolve(model.unet))
            if told := schedule_differences(folder, self.config.diffusion):
                log.warning("%s: %s", model.unet, "; ".join(told))
        return place(self.task.initial(), self.state_shardings["params"]), source

    def _check_vocabulary(self, stored: list[str]) -> None:
        """Raises UserError for another vocabulary in the checkpoint, unless changes are accepted.

        Query ids are positions in the vocabulary: with another one, they would name other classes.
        """
        if stored == self.vocabulary or self.accept_changes:
            return
        gone = [text for text in stored if text not in self.vocabulary]
        new = [text for text in self.vocabulary if text not in stored]
        raise UserError(
            f"{self.workdir}: its checkpoint has another vocabulary (gone: {gone[:5]}, new: {new[:5]}"
            f"{', another order' if not gone and not new else ''}); --accept_changes continues with "
            "the new one"
        )

    def _check_examples(self, stored: dict[str, list[Any]]) -> None:
        """Raises UserError for other training examples than the checkpoint's, unless accepted."""
        if self.accept_changes:
            return
        for name, (count, names, classes) in self.examples.items():
            # Checkpoints of earlier versions lack the counts of the classes.
            before, digest, *known = stored.get(name, (count, names))
            if before != count:
                differs = f"{before} examples, now {count}"
            elif digest and names and digest != names:
                differs = "others of other names"
            elif known not in ([], [classes]):
                differs = "their classes have been counted anew since"
            else:
                continue
            raise UserError(
                f"{self.workdir}: the training data are not those of its checkpoint ({name}: "
                f"{differs}); --accept_changes goes on with them, in another order"
            )

    @functools.cached_property
    def examples(self) -> dict[str, list[Any]]:
        """What is known of the training examples, see `training_examples`."""
        # Captions are of the labels themselves, whatever is frequent.
        return training_examples(self.config.data, by_class=self.config.task != "prior")

    @property
    def vocabulary(self) -> list[str]:
        """Texts that the query ids of this run stand for; empty for a task without text."""
        return list(self.task.prompts)

    def _initial_state(self, params: Params) -> TrainState:
        """State of step 0 from its parameters; traced under jit."""
        optimizer = make_optimizer(self.config.optim, self.config.train.steps)
        return initial_state(params, optimizer, self.config.optim)

    def run(
        self,
        on_eval: Callable[[int, TrainState], dict[str, float]] | None = None,
        on_logged: Callable[[int, MetricWriter], None] | None = None,
    ) -> TrainState:
        """Trains until `config.train.steps` and returns the final state.

        Args:
          on_eval: called with the step and the state every `config.logging.eval_every` steps; returns
            metrics by name, which are logged and saved with the checkpoint.
          on_logged: called with the step and the writer once the metrics of `on_eval` are written.

        Raises:
          NotFinite: the loss or the gradient norm is not finite; WORKDIR/failure has the step.
          Preempted: the process was asked to leave; the step that the message names is saved.
          UserError: a batch that the devices do not divide, or a checkpoint or a record that cannot be
            read or written.
        """
        self.check_batch()
        check_all_agree({"the training data (examples, names)": self.examples})
        with contextlib.ExitStack() as stack:
            checkpointer = Checkpointer(self.workdir, self.config.checkpoint)
            stack.enter_context(checkpointer)
            start, state = self.start_state(checkpointer)

            # Lines of a killed run beyond the restored step are cut off: those steps are trained again.
            writer = MetricWriter(self.workdir, truncate_after=start, wandb=self.config.logging.wandb)
            log = TrainLog(self.config.train, writer, list(self.mesh.devices.flat))
            stack.push(log.leave)
            try:
                return self._steps(start, state, checkpointer, log, on_eval, on_logged)
            except NotFinite as error:
                advice = self._save_failure(error, checkpointer)
                raise NotFinite(error.step, error.metrics, advice) from None

    def check_batch(self) -> None:
        """Raises UserError if the devices do not divide a step's batch."""
        batch, parts = self.config.train.batch_size, self.config.compute.accumulation or 1
        check_batch("config.train.batch_size", batch, self.mesh, parts)

    def _steps(
        self,
        start: int,
        state: TrainState,
        checkpointer: Checkpointer,
        log: TrainLog,
        on_eval: Callable[[int, TrainState], dict[str, float]] | None,
        on_logged: Callable[[int, MetricWriter], None] | None,
    ) -> TrainState:
        """Trains the steps after `start`; `run` says what it raises."""
        logging, steps = self.config.logging, self.config.train.steps

        # A run that is finished already opens no stream.
        with (
            contextlib.nullcontext(()) if start >= steps else self.batches(start) as stream,
            contextlib.closing(ProfilerWindow(logging.profile, f"{self.workdir}/profile")) as profile,
            ExampleLog(as_path(self.workdir), start, logging.examples) as examples,
            PreemptionWatch() as preemption,
        ):
            batches = place_ahead(stream, self.mesh)
            for step in range(start + 1, steps + 1):
                # Next batch: `rows` are this host's arrays, `batch` the same on the devices. The time
                # until it is there counts as waiting for data.
                with log.watch("data"):
                    rows, batch = next(batches)
                    examples.add(step, rows)

                # The first batch gives the shapes: count the model's FLOPs, compile on all processes.
                if step == start + 1:
                    log.flops = step_flops(self.task, batch)
                    run_step = self._compiled_by_all(state, batch)

                # Step. It is dispatched, not awaited: the host prepares the next batch meanwhile.
                profile.before(step)
                compiles = step == start + 1
                with heartbeat("compiling the train step") if compiles else contextlib.nullcontext():
                    state, metrics = run_step(state, self.frozen, batch)
                profile.after(step, metrics)

                # A save that failed in the background is raised here, before the step counts as done.
                with log.watch("checkpoint"):
                    checkpointer.check(step)
                log.add(step, metrics)

                # Evaluate, but never a state that is not finite.
                extra = {}
                if on_eval and logging.eval_every and step % logging.eval_every == 0:
                    log.check()
                    with log.watch("eval"):
                        extra = on_eval(step, state)

                # An evaluation gets its own line, also between two logged steps.
                if step % logging.every == 0 or step == steps or extra:
                    log.write(step, extra)
                if extra and on_logged:
                    with log.watch("eval"):
                        on_logged(step, log.writer)

                # Save. `reached` is collective: every process leaves after the same step.
                leaving = preemption.reached()
                if leaving or self._is_saved(step, extra):
                    log.check()  # a state that is not finite must not become a checkpoint
                    with log.watch("checkpoint"):
                        self._save(step, state, extra, checkpointer, log, examples)

                # After the last step there is nothing to resume: weights are exported, and an
                # evaluation leaves before its first image.
                if leaving and step < steps:
                    checkpointer.wait()
                    raise Preempted(f"preempted: step {step} is saved in {checkpointer.folder}")
        return state

    def _compiled_by_all(self, state: TrainState, batch: Batch) -> Callable[..., Any]:
        """The compiled step, returned once every process has it.

        A collective gives up on a process that is late (on CPUs after 30 s, which no setting changes),
        and busy machines compile at different speeds.
        """
        if jax.process_count() == 1:
            return self.step_fn
        with heartbeat("compiling the train step"):
            compiled = self.step_fn.lower(state, self.frozen, batch).compile()
        barrier("the compiled train step", COMPILE_TIMEOUT)
        return compiled

    def _is_saved(self, step: int, extra: dict[str, float]) -> bool:
        """True every `checkpoint.every` steps, at the last step, and where `best` was measured."""
        last = step == self.config.train.steps
        measured = self.config.checkpoint.best in extra
        return step % self.config.checkpoint.every == 0 or last or measured

    def _save(
        self,
        step: int,
        state: TrainState,
        extra: dict[str, float],
        checkpointer: Checkpointer,
        log: TrainLog,
        examples: ExampleLog,
    ) -> None:
        """Saves the state after the records, so that no record lacks a step that a checkpoint has."""
        log.writer.sync()
        examples.sync()
        meta = {"config": to_dict(self.config), "vocabulary": self.vocabulary}
        meta["examples"] = self.examples
        if constants := self.task.constants():
            meta["constants"] = constants
        checkpointer.save(step, state, meta, extra or None)

    def _save_failure(self, error: NotFinite, checkpointer: Checkpointer) -> str:
        """Draws the failed step's batch again and saves it; returns advice for the user."""
        with self.batches(error.step - 1) as stream:
            batch = next(stream)

        # The replay starts from the newest checkpoint; 0 stands for the initial state.
        last = checkpointer.latest_step() or 0
        kept = f"step {last} is saved in {checkpointer.folder}" if last else "no step is saved"
        try:
            with explained(f"{self.workdir}/failure", "cannot be written"):
                folder = save_failure(self.workdir, error, batch, self.config.seed, last)
            kept += f", the batch in {folder}; {REPLAY.format(workdir=self.workdir)}"
        except UserError as failed:  # such as a full disk: the loss must be reported all the same
            kept += f", the batch is not: {failed}"

        optim = self.config.optim
        return (
            f"; {kept}; or try a lower config.optim.learning_rate (now {optim.learning_rate:g}) or "
            f"more config.optim.warmup_steps (now {optim.warmup_steps}), here with --accept_changes"
        )

    def batches(self, start: int) -> Batches:
        """This host's rows of the batches after step `start`; close the stream when done."""
        host, hosts = data_share(self.mesh)
        return training_stream(
            self.config.data,
            self.config.task,
            seed=self.config.seed,
            batch_size=self.config.train.batch_size,
            start=start,
            host=host,
            hosts=hosts,
            loading=self.config.loading,
        )


def _shapes(constants: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of each constant of a task."""
    return {name: np.shape(value) for name, value in constants.items()}
