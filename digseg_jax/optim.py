# SPDX-License-Identifier: Apache-2.0
"""Optimizer, learning-rate schedule and the moving average of the weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from digseg_jax.arraytypes import Array, Params
from digseg_jax.config import OptimConfig


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then cosine, exponential or constant down to final_scale at `steps`."""
    peak, warmup = config.learning_rate, min(config.warmup_steps, max(steps - 1, 0))
    rest = max(steps - warmup, 1)
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, rest, alpha=config.final_scale)
    elif config.schedule == "exponential":
        decay = optax.exponential_decay(peak, rest, config.final_scale)
    else:
        decay = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """AdamW on clipped gradients; kernels decay, biases and norms do not."""

    def kernels(params: Params) -> Params:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=kernels,
        ),
    )


def update_ema(ema: Params, params: Params, step: Array, decay: float) -> Params:
    """One step of the moving average; short at first, so that it forgets the start."""
    rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - rate) * (p - e), ema, params)
