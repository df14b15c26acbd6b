# SPDX-License-Identifier: Apache-2.0
"""The training loop: data, step, log, save; the same for every task."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from digseg_jax import config as config_lib
from digseg_jax.arraytypes import Array, Batch, Params
from digseg_jax.checkpoint import Checkpointer, abstract_with_shardings
from digseg_jax.config import Config
from digseg_jax.data.pipeline import training_stream
from digseg_jax.errors import UserError
from digseg_jax.log import log
from digseg_jax.optim import learning_rate, make_optimizer, update_ema
from digseg_jax.sharding import BATCH, infer_shardings, place, place_batch
from digseg_jax.tasks.base import Task, example_keys
from digseg_jax.writers import MetricWriter, Progress

TrainState = dict[str, Any]  # {"step", "params", "ema", "opt"}: a pure pytree


def initial_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state of step 0 from parameters of any kind (arrays or, under eval_shape, abstract)."""
    return {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "ema": jax.tree.map(jnp.array, params),
        "opt": optimizer.init(params),
    }


def make_train_step(
    task: Task, config: Config, mesh: Mesh, state_shardings: Any, frozen_shardings: Any
) -> Callable[[TrainState, Params, Batch], tuple[TrainState, dict[str, Array]]]:
    """One optimizer step, jitted for the mesh; the state is donated."""
    optimizer = make_optimizer(config.optim, config.train.steps)
    rate = learning_rate(config.optim, config.train.steps)

    def train_step(state: TrainState, frozen: Params, batch: Batch):
        keys = example_keys(config.seed, batch["index"])
        grad = jax.value_and_grad(task.loss, has_aux=True)
        (loss, metrics), grads = grad(state["params"], frozen, batch, keys)
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics |= {
            "loss": loss,
            "grad_norm": optax.global_norm(grads),
            "learning_rate": rate(state["step"]),
        }
        ema = update_ema(state["ema"], params, state["step"], config.optim.ema_decay)
        return {"step": state["step"] + 1, "params": params, "ema": ema, "opt": opt}, metrics

    replicated = NamedSharding(mesh, P())
    return jax.jit(
        train_step,
        in_shardings=(state_shardings, frozen_shardings, NamedSharding(mesh, BATCH)),
        out_shardings=(state_shardings, replicated),
        donate_argnums=0,
    )


class Trainer:
    """A run in a working directory: builds or restores the state, then trains to the last step."""

    def __init__(self, config: Config, task: Task, mesh: Mesh, workdir: str):
        self.config, self.task, self.mesh, self.workdir = config, task, mesh, workdir
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        if config.train.batch_size % shards:
            raise UserError(
                f"config.train.batch_size={config.train.batch_size}: must be a multiple of {shards}, "
                "the devices along config.mesh.data and fsdp"
            )
        self.optimizer = make_optimizer(config.optim, config.train.steps)
        params = task.initial()
        abstract = jax.eval_shape(lambda p: initial_state(p, self.optimizer), params)
        self.state_shardings = infer_shardings(abstract, mesh)
        self.abstract_state = abstract_with_shardings(abstract, self.state_shardings)
        self.initial_params = params
        frozen_shardings = infer_shardings(task.frozen, mesh)
        self.frozen = place(task.frozen, frozen_shardings)
        self.step_fn = make_train_step(task, config, mesh, self.state_shardings, frozen_shardings)

    def start_state(self, checkpointer: Checkpointer) -> tuple[int, TrainState]:
        """Own checkpoint if there is one, else the task's initial parameters."""
        if checkpointer.latest_step() is not None:
            step, state = checkpointer.restore(self.abstract_state)
            log.info("start: resumed from %s at step %d", checkpointer.folder, step)
            return step, state
        placed = place(self.initial_params, self.state_shardings["params"])
        make = jax.jit(
            lambda p: initial_state(p, self.optimizer), out_shardings=self.state_shardings
        )
        log.info("start: step 0, from the task's initial parameters")
        return 0, make(placed)

    def run(
        self, on_eval: Callable[[int, TrainState], dict[str, float]] | None = None
    ) -> TrainState:
        """Trains until `config.train.steps`; returns the final state."""
        steps = self.config.train.steps
        meta = {"config": config_lib.to_dict(self.config)}
        with Checkpointer(self.workdir, self.config.checkpoint) as checkpointer:
            start, state = self.start_state(checkpointer)
            log = _Log(self.config, self.workdir, start)
            batches = self._batches(start) if start < steps else iter(())
            for step in range(start + 1, steps + 1):
                batch = place_batch(next(batches), self.mesh)
                state, metrics = self.step_fn(state, self.frozen, batch)
                log.add(metrics)
                every = self.config.train.eval_every
                extra = on_eval(step, state) if on_eval and every and step % every == 0 else {}
                if step % self.config.train.log_every == 0 or step == steps or extra:
                    log.write(step, extra)
                if step % self.config.checkpoint.every == 0 or step == steps:
                    checkpointer.save(step, state, meta)
            log.close()
        return state

    def _batches(self, start: int):
        return training_stream(
            self.config.data,
            self.config.task,
            seed=self.config.seed,
            batch_size=self.config.train.batch_size,
            start=start,
            host=jax.process_index(),
            hosts=jax.process_count(),
        )


class _Log:
    """Collects step metrics on the device and fetches them once per logged line."""

    def __init__(self, config: Config, workdir: str, start: int):
        self.config = config
        self.writer = MetricWriter(workdir, truncate_after=start)
        self.progress = Progress(config.train.steps)
        self.pending: list[dict[str, Array]] = []
        self.since = time.monotonic()

    def add(self, metrics: dict[str, Array]) -> None:
        self.pending.append(metrics)

    def write(self, step: int, extra: dict[str, float]) -> None:
        """Raises FloatingPointError if the loss is no longer a number."""
        fetched = jax.device_get(self.pending)
        mean = {k: float(np.mean([m[k] for m in fetched])) for k in fetched[0]}
        seconds = time.monotonic() - self.since
        mean["images_per_second"] = len(fetched) * self.config.train.batch_size / seconds
        self.writer.write(step, mean | extra)
        self.progress.update(step, mean["images_per_second"], loss=mean["loss"], **extra)
        self.pending, self.since = [], time.monotonic()
        if not np.isfinite(mean["loss"]):
            raise FloatingPointError(f"loss is {mean['loss']} at step {step}: see metrics.jsonl")

    def close(self) -> None:
        self.progress.close()
        self.writer.close()
