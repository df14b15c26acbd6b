# SPDX-License-Identifier: Apache-2.0
"""The training loop: data, step, log, save; the same for every task."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from digseg_jax.arraytypes import Batch, Params
from digseg_jax.config.parse import to_dict
from digseg_jax.config.schema import Config
from digseg_jax.data.pipeline import training_stream
from digseg_jax.data.stream import Batches
from digseg_jax.errors import Preempted, UserError
from digseg_jax.io.checkpoint import Checkpointer, abstract_with_shardings
from digseg_jax.io.metric_writer import require_wandb
from digseg_jax.io.storage import as_path
from digseg_jax.log import heartbeat, log
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
from digseg_jax.training.step import TrainState, abstract_state, initial_state, make_train_step
from digseg_jax.training.tasks.base import Task
from digseg_jax.training.tasks.latents import check_cache
from digseg_jax.training.train_log import NotFinite, TrainLog

COMPILE_TIMEOUT = 3600.0  # seconds that the first process to have compiled waits for the last


class Trainer:
    """A run in a working directory: builds or restores the state, then trains to the last step."""

    def __init__(
        self,
        config: Config,
        task: Task,
        mesh: Mesh,
        workdir: str,
        *,
        accept_changes: bool = False,
    ):
        self.config, self.task, self.mesh, self.workdir = config, task, mesh, workdir
        self.accept_changes = accept_changes
        train = config.train
        check_batch("config.train.batch_size", train.batch_size, mesh, train.accumulation)
        require_wandb(config.train.wandb)
        check_freeze(task.abstract, config.optim.freeze)
        if config.data.latent_cache:
            check_cache(config, task)
        abstract = abstract_state(task.abstract, config)
        self.state_shardings = infer_shardings(abstract, mesh)
        self.abstract_state = abstract_with_shardings(abstract, self.state_shardings)
        frozen_shardings = infer_shardings(task.frozen, mesh)
        self.frozen = place(task.frozen, frozen_shardings)
        log.info("state: %s", describe_memory(abstract, self.state_shardings))
        self.step_fn = make_train_step(task, config, mesh, self.state_shardings, frozen_shardings)

    def start_state(self, checkpointer: Checkpointer) -> tuple[int, TrainState]:
        """Own checkpoint, else `config.init_from`, else pretrained or random, as the task says.

        Raises:
          UserError: a checkpoint that cannot be used, or one of another vocabulary.
        """
        if checkpointer.latest_step() is not None:
            step, state, meta = checkpointer.restore(self.abstract_state)
            self._check_vocabulary(meta.get("vocabulary", self.vocabulary))
            log.info("start: resumed from %s at step %d", checkpointer.folder, step)
            return step, state
        if self.config.init_from:
            params, source = self.weights_of(self.config.init_from)
        else:
            params, source = self._initial_params()
        make = jax.jit(self._initial_state, out_shardings=self.state_shardings)
        log.info("start: step 0, from %s", source)
        return 0, make(params)

    def weights_of(self, workdir: str, *, best: bool = False) -> tuple[Params, str]:
        """The averaged weights of a run's newest (or best) checkpoint, sharded, and where they lie.

        Raises:
          UserError: no checkpoint there, or not of this model.
        """
        name = "ema" if "ema" in self.abstract_state else "params"
        with Checkpointer(workdir, self.config.checkpoint, create=False) as other:
            step = other.best_step() if best else other.latest_step()
            if step is None:
                raise UserError(f"{other.folder}: no checkpoint here to start from")
            part = other.restore_part({name: self.abstract_state[name]}, step)
            return part[name], f"{other.folder / str(step)}"

    def _initial_params(self) -> tuple[Params, str]:
        model = self.config.model
        pretrained = self.config.task == "segmentation" and model.unet_init == "pretrained"
        source = f"the pretrained {model.unet}" if pretrained else "random weights"
        return place(self.task.initial(), self.state_shardings["params"]), source

    def _check_vocabulary(self, stored: list[str]) -> None:
        """Query ids are places in the vocabulary: a resumed run must have the same one."""
        if stored == self.vocabulary or self.accept_changes:
            return
        gone = [text for text in stored if text not in self.vocabulary]
        new = [text for text in self.vocabulary if text not in stored]
        raise UserError(
            f"{self.workdir}: its checkpoint has another vocabulary (gone: {gone[:5]}, new: {new[:5]}"
            f"{', another order' if not gone and not new else ''}); --accept_changes goes on with the "
            "new one"
        )

    @property
    def vocabulary(self) -> list[str]:
        return list(getattr(self.task, "prompts", ()))

    def _initial_state(self, params: Params) -> TrainState:
        optimizer = make_optimizer(self.config.optim, self.config.train.steps)
        return initial_state(params, optimizer, self.config.optim)

    def run(self, on_eval: Callable[[int, TrainState], dict[str, float]] | None = None) -> TrainState:
        """Trains until `config.train.steps`; returns the final state.

        Raises:
          NotFinite: the loss or the gradient norm is no number; WORKDIR/failure has the step.
          Preempted: asked to leave; the step that it names is saved.
          UserError: a checkpoint or a record cannot be read or written.
        """
        with contextlib.ExitStack() as stack:
            checkpointer = Checkpointer(self.workdir, self.config.checkpoint)
            stack.enter_context(checkpointer)
            start, state = self.start_state(checkpointer)
            log = TrainLog(self.config, self.workdir, start, list(self.mesh.devices.flat))
            stack.push(log.leave)
            try:
                return self._steps(start, state, checkpointer, log, on_eval)
            except NotFinite as error:
                self._save_failure(error, checkpointer)
                raise

    def _steps(
        self,
        start: int,
        state: TrainState,
        checkpointer: Checkpointer,
        log: TrainLog,
        on_eval: Callable[[int, TrainState], dict[str, float]] | None,
    ) -> TrainState:
        train, steps = self.config.train, self.config.train.steps
        with (
            contextlib.nullcontext(()) if start >= steps else self.batches(start) as stream,
            contextlib.closing(ProfilerWindow(train.profile, f"{self.workdir}/profile")) as profile,
            ExampleLog(as_path(self.workdir), start, train.log_examples) as examples,
            PreemptionWatch() as preemption,
        ):
            batches = place_ahead(stream, self.mesh)
            for step in range(start + 1, steps + 1):
                with log.watch("data"):
                    rows, batch = next(batches)
                    examples.add(step, rows)
                if step == start + 1:
                    log.flops = step_flops(self.task, batch)
                    run_step = self._compiled_by_all(state, batch)
                profile.before(step)
                compiles = step == start + 1
                with heartbeat("compiling the train step") if compiles else contextlib.nullcontext():
                    state, metrics = run_step(state, self.frozen, batch)
                profile.after(step, metrics)
                with log.watch("checkpoint"):
                    checkpointer.check(step)  # before the step counts as done
                log.add(step, metrics)
                extra = {}
                if on_eval and train.eval_every and step % train.eval_every == 0:
                    log.check()
                    with log.watch("eval"):
                        extra = on_eval(step, state)
                if step % train.log_every == 0 or step == steps or extra:
                    log.write(step, extra)
                leaving = preemption.reached(step)
                if leaving or self._is_saved(step, extra):
                    log.check()  # a state that is no number must not become a checkpoint
                    with log.watch("checkpoint"):
                        self._save(step, state, extra, checkpointer, log, examples)
                if leaving and step < steps:
                    checkpointer.wait()
                    raise Preempted(f"preempted: step {step} is saved in {checkpointer.folder}")
        return state

    def _compiled_by_all(self, state: TrainState, batch: Batch) -> Callable[..., Any]:
        """The step, once every process has compiled it.

        A collective gives up on a process that is late (on CPUs after 30 s, which nothing changes), and
        busy machines compile at different speeds.
        """
        if jax.process_count() == 1:
            return self.step_fn
        with heartbeat("compiling the train step"):
            compiled = self.step_fn.lower(state, self.frozen, batch).compile()
        barrier("the compiled train step", COMPILE_TIMEOUT)
        return compiled

    def _is_saved(self, step: int, extra: dict[str, float]) -> bool:
        """True every `checkpoint.every` steps, at the last one, and where `best` was measured."""
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
        """The records first: what a checkpoint has behind it is never missing from them."""
        log.writer.sync()
        examples.sync()
        meta = {"config": to_dict(self.config), "vocabulary": self.vocabulary}
        checkpointer.save(step, state, meta, extra or None)

    def _save_failure(self, error: NotFinite, checkpointer: Checkpointer) -> None:
        with self.batches(error.step - 1) as stream:
            batch = next(stream)
        last = checkpointer.latest_step() or 0
        folder = save_failure(self.workdir, error, batch, self.config.seed, last)
        log.info("%s: saved %s; %s", error, folder, REPLAY.format(workdir=self.workdir))

    def batches(self, start: int) -> Batches:
        """This host's part of the batches of the steps after `start`; close it when done."""
        host, hosts = data_share(self.mesh)
        return training_stream(
            self.config.data,
            self.config.task,
            seed=self.config.seed,
            batch_size=self.config.train.batch_size,
            start=start,
            host=host,
            hosts=hosts,
        )
