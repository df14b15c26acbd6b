# SPDX-License-Identifier: Apache-2.0
"""The training loop: data, step, log, save; the same for every task."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from digseg_jax import config as config_lib
from digseg_jax.arraytypes import Params
from digseg_jax.checkpoint import Checkpointer, abstract_with_shardings
from digseg_jax.config import Config
from digseg_jax.data.pipeline import training_stream
from digseg_jax.errors import UserError
from digseg_jax.failure import REPLAY, save_failure
from digseg_jax.log import log
from digseg_jax.optim import check_freeze, make_optimizer
from digseg_jax.perf import ProfilerWindow, step_flops
from digseg_jax.sharding import describe_memory, infer_shardings, place, place_batch
from digseg_jax.step import TrainState, initial_state, make_train_step
from digseg_jax.tasks.base import Task
from digseg_jax.train_log import NotFinite, TrainLog
from digseg_jax.writers import require_wandb


class Trainer:
    """A run in a working directory: builds or restores the state, then trains to the last step."""

    def __init__(self, config: Config, task: Task, mesh: Mesh, workdir: str):
        self.config, self.task, self.mesh, self.workdir = config, task, mesh, workdir
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        parts = shards * config.train.accumulation
        if config.train.batch_size % parts:
            raise UserError(
                f"config.train.batch_size={config.train.batch_size}: must be a multiple of {parts}: "
                f"{shards} devices along config.mesh.data and fsdp, times config.train.accumulation="
                f"{config.train.accumulation}"
            )
        require_wandb(config.train.wandb)
        check_freeze(task.abstract, config.optim.freeze)
        abstract = jax.eval_shape(self._initial_state, task.abstract)
        self.state_shardings = infer_shardings(abstract, mesh)
        self.abstract_state = abstract_with_shardings(abstract, self.state_shardings)
        frozen_shardings = infer_shardings(task.frozen, mesh)
        self.frozen = place(task.frozen, frozen_shardings)
        log.info("state: %s", describe_memory(abstract, self.state_shardings))
        self.step_fn = make_train_step(task, config, mesh, self.state_shardings, frozen_shardings)

    def start_state(self, checkpointer: Checkpointer) -> tuple[int, TrainState]:
        """Own checkpoint if there is one, else the task's initial parameters."""
        if checkpointer.latest_step() is not None:
            step, state = checkpointer.restore(self.abstract_state)
            log.info("start: resumed from %s at step %d", checkpointer.folder, step)
            return step, state
        with jax.default_device(jax.local_devices(backend="cpu")[0]):  # never whole on one chip
            params = self.task.initial()
        placed = place(params, self.state_shardings["params"])
        del params
        make = jax.jit(self._initial_state, out_shardings=self.state_shardings)
        log.info("start: step 0, from the task's initial parameters")
        return 0, make(placed)

    def _initial_state(self, params: Params) -> TrainState:
        optimizer = make_optimizer(self.config.optim, self.config.train.steps)
        return initial_state(params, optimizer, self.config.optim)

    def run(
        self, on_eval: Callable[[int, TrainState], dict[str, float]] | None = None
    ) -> TrainState:
        """Trains until `config.train.steps`; returns the final state.

        Raises:
          NotFinite: the loss or the gradient norm is no number; WORKDIR/failure has the step.
        """
        with Checkpointer(self.workdir, self.config.checkpoint) as checkpointer:
            start, state = self.start_state(checkpointer)
            log = TrainLog(self.config, self.workdir, start, list(self.mesh.devices.flat))
            profile = ProfilerWindow(self.config.train.profile, f"{self.workdir}/profile")
            try:
                return self._steps(start, state, checkpointer, log, profile, on_eval)
            except NotFinite as error:
                self._save_failure(error, checkpointer)
                raise
            finally:
                profile.close()
                log.close()

    def _steps(
        self,
        start: int,
        state: TrainState,
        checkpointer: Checkpointer,
        log: TrainLog,
        profile: ProfilerWindow,
        on_eval: Callable[[int, TrainState], dict[str, float]] | None,
    ) -> TrainState:
        train, steps = self.config.train, self.config.train.steps
        meta = {"config": config_lib.to_dict(self.config)}
        batches = self.batches(start) if start < steps else iter(())
        for step in range(start + 1, steps + 1):
            with log.watch("data"):
                batch = place_batch(next(batches), self.mesh)
            if step == start + 1:
                lowered = self.step_fn.lower(state, self.frozen, batch)
                log.flops = step_flops(lowered, train.accumulation)
            profile.before(step)
            state, metrics = self.step_fn(state, self.frozen, batch)
            profile.after(step, metrics)
            log.add(step, metrics)
            extra = {}
            if on_eval and train.eval_every and step % train.eval_every == 0:
                log.check()
                with log.watch("eval"):
                    extra = on_eval(step, state)
            if step % train.log_every == 0 or step == steps or extra:
                log.write(step, extra)
            if step % self.config.checkpoint.every == 0 or step == steps:
                log.check()  # a state that is no number must not become a checkpoint
                with log.watch("checkpoint"):
                    checkpointer.save(step, state, meta)
        return state

    def _save_failure(self, error: NotFinite, checkpointer: Checkpointer) -> None:
        batch = next(self.batches(error.step - 1))
        last = checkpointer.latest_step() or 0
        folder = save_failure(self.workdir, error, batch, self.config.seed, last)
        log.info("%s: saved %s; %s", error, folder, REPLAY.format(workdir=self.workdir))

    def batches(self, start: int) -> Iterator[dict[str, np.ndarray]]:
        """This host's part of the batches of the steps after `start`."""
        return training_stream(
            self.config.data,
            self.config.task,
            seed=self.config.seed,
            batch_size=self.config.train.batch_size,
            start=start,
            host=jax.process_index(),
            hosts=jax.process_count(),
        )
