# SPDX-License-Identifier: Apache-2.0
"""One optimizer step: loss and gradients (accumulated if asked), update, moving average."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from digseg_jax.arraytypes import Array, Batch, Params
from digseg_jax.config.schema import OptimConfig
from digseg_jax.runtime.sharding import BATCH, on_mesh
from digseg_jax.runtime.tpu import compiler_options
from digseg_jax.training.optim import (
    join_frozen,
    learning_rate,
    make_optimizer,
    split_frozen,
    update_ema,
)
from digseg_jax.training.tasks.base import Trainable, example_keys

TrainState = dict[str, Any]  # {"step", "params", "opt"} and maybe "ema": a pure pytree
LossAndGrads = tuple[tuple[Array, dict[str, Array]], Params]
Gradient = Callable[..., LossAndGrads]  # (batch), or (microbatch, full batch)


def initial_state(
    params: Params, optimizer: optax.GradientTransformation, config: OptimConfig
) -> TrainState:
    """State of step 0 from its parameters: arrays or, under `jax.eval_shape`, abstract ones."""
    # Frozen parameters stay in the state but have no moments.
    trainable, _ = split_frozen(params, config.freeze)
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "opt": optimizer.init(trainable)}
    if config.ema_decay:
        # A copy: the step donates the state, and one buffer cannot be donated twice.
        state["ema"] = jax.tree.map(jnp.array, params)
    return state


def abstract_state(params: Params, optim: OptimConfig) -> TrainState:
    """Shapes of the state of step 0, from shapes of the parameters."""
    optimizer = make_optimizer(optim, steps=1)  # the length of the schedule changes no shape
    return jax.eval_shape(lambda p: initial_state(p, optimizer, optim), params)


def averaged(state: TrainState) -> Params:
    """The parameters to evaluate and export: the moving average, or `params` if none is kept."""
    return state["ema"] if "ema" in state else state["params"]


def make_train_step(
    task: Trainable,
    mesh: Mesh,
    state_shardings: Any,
    frozen_shardings: Any,
    optim: OptimConfig,
    *,
    steps: int,
    seed: int,
    accumulation: int = 1,
) -> jax.stages.Wrapped:
    """Builds the train step (state, frozen, batch) -> (state, metrics), jitted for the mesh.

    The state is donated. The batch is sharded along its examples; metrics are scalars, the same on
    every device: the task's, "loss", "grad_norm" (before clipping) and "learning_rate".

    Args:
      steps: length of the training, for the schedule of the learning rate.
      seed: of everything that is drawn.
      accumulation: microbatches that the batch is split into.
    """
    task.prepare()

    # The optimizer sees only the parameters that learn; `like` are their shardings.
    optimizer = make_optimizer(optim, steps, task.new)
    rate = learning_rate(optim, steps)
    like, _ = split_frozen(state_shardings["params"], optim.freeze)

    def train_step(state: TrainState, frozen: Params, batch: Batch):
        """One step; traced once."""
        trainable, fixed = split_frozen(state["params"], optim.freeze)

        def gradient(part: Batch, *whole: Batch) -> LossAndGrads:
            """((loss, metrics), gradients) of (batch), or of (microbatch, full batch)."""
            # One key per example, a function of (seed, example index): neither the number of devices
            # nor accumulation changes what is drawn.
            keys = example_keys(seed, part["index"])

            def loss(learned: Params) -> tuple[Array, dict[str, Array]]:
                return task.loss(join_frozen(learned, fixed), frozen, part, keys, *whole)

            return jax.value_and_grad(loss, has_aux=True)(trainable)

        # Loss and gradients; the sum of an accumulation starts from zeros sharded like the parameters.
        if accumulation <= 1:
            (loss, metrics), grads = gradient(batch)
        else:
            zeros = jax.lax.with_sharding_constraint(jax.tree.map(jnp.zeros_like, trainable), like)
            (loss, metrics), grads = accumulate(gradient, zeros, batch, accumulation, mesh)

        # Update what learns.
        updates, opt = optimizer.update(grads, state["opt"], trainable)
        params = join_frozen(optax.apply_updates(trainable, updates), fixed)

        # The rate is that of this update, so the schedule is read at the old step.
        metrics |= {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": rate(state["step"]),
        }

        # Moving average of all parameters.
        average = {}
        if optim.ema_decay:
            decay = optim.ema_decay
            average["ema"] = update_ema(state["ema"], params, state["step"], decay)
        return {"step": state["step"] + 1, "params": params, "opt": opt} | average, metrics

    # The task's shardings go in and come out, so that no step moves the state.
    replicated = NamedSharding(mesh, P())
    return jax.jit(
        on_mesh(mesh, train_step),
        in_shardings=(state_shardings, frozen_shardings, NamedSharding(mesh, BATCH)),
        out_shardings=(state_shardings, replicated),
        donate_argnums=0,
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )


def accumulate(gradient: Gradient, zeros: Params, batch: Batch, parts: int, mesh: Mesh) -> LossAndGrads:
    """Loss, metrics and gradients of a batch, as means over equal microbatches taken in turn.

    Microbatch i has the examples i, i + parts, ...: every device's share of the batch is split, and no
    example is moved to another device.

    Args:
      gradient: called with (microbatch, full batch).
      zeros: zeros of the gradients' shapes and shardings, where the sum starts.
      batch: arrays [b, ...], b divisible by parts times the devices of the batch.
      parts: number of microbatches.
    """
    sharding = NamedSharding(mesh, P(None, *BATCH))

    def split(x: Array) -> Array:  # [b, ...] -> [parts, b / parts, ...]
        x = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, sharding)

    def add(total: Any, part: Batch) -> tuple[Any, dict[str, Array]]:
        (loss, metrics), grads = gradient(part, batch)
        return jax.tree.map(jnp.add, total, (loss, grads)), metrics

    # A scan, not an unrolled loop: one microbatch's activations are alive at a time.
    start = (jnp.zeros(()), zeros)
    total, metrics = jax.lax.scan(add, start, jax.tree.map(split, batch))

    # Sums become means; metrics come out of the scan stacked, [parts].
    loss, grads = jax.tree.map(lambda x: x / parts, total)
    return (loss, {name: value.mean(axis=0) for name, value in metrics.items()}), grads
