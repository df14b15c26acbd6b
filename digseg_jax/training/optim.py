# SPDX-License-Identifier: Apache-2.0
"""Optimizer, learning-rate schedule, frozen parameters and the moving average of the weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from digseg_jax import trees
from digseg_jax.arraytypes import Array, Params
from digseg_jax.config.schema import OptimConfig
from digseg_jax.errors import UserError, nearest

B1 = 0.9  # decay of Adam's first moment


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0, then the configured decay to the end of the run.

    Cosine and exponential decays reach `final_scale` times the peak at `steps`, and so does a constant
    rate with `cooldown_steps`: a line down over that many steps at the end (Hägele et al., 2024).
    """
    # A run shorter than its warm-up still reaches the peak, at its last step.
    peak, warmup = config.learning_rate, min(config.warmup_steps, max(steps - 1, 0))
    rest = max(steps - warmup, 1)

    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, rest, alpha=config.final_scale)
    elif config.schedule == "exponential":
        decay = optax.exponential_decay(peak, rest, config.final_scale)
    elif config.cooldown_steps:
        line = min(config.cooldown_steps, rest)
        decay = optax.linear_schedule(peak, config.final_scale * peak, line, rest - line)
    else:
        decay = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def make_optimizer(
    config: OptimConfig, steps: int, new: Iterable[str] = ()
) -> optax.GradientTransformation:
    """AdamW on gradients clipped by their global norm; only kernels have weight decay.

    new: regexes on paths of parameters that learn at `new_lr_scale` times the rate. The state does not
      depend on them.
    """

    # Neither biases and the scales of norms, nor a prompt that is learned: a table of vectors.
    def kernels(params: Params) -> Params:
        flat = trees.flatten(params)
        return trees.unflatten({path: path.rpartition(".")[2] == "kernel" for path in flat})

    optimizer = optax.chain(
        # Clipping first: AdamW's moments then see bounded gradients.
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=B1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=kernels,
            mu_dtype=None if config.mu_dtype == "float32" else config.mu_dtype,
        ),
    )
    patterns = tuple(new)
    return _faster(optimizer, config.new_lr_scale, patterns) if patterns else optimizer


def _faster(
    optimizer: optax.GradientTransformation, scale: float, patterns: tuple[str, ...]
) -> optax.GradientTransformation:
    """The optimizer with the updates of parameters whose path a regex matches multiplied by `scale`."""

    def update(grads: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        updates, state = optimizer.update(grads, state, params)
        flat = trees.flatten(updates)
        return trees.unflatten(
            {path: scale * x if _matches(path, patterns) else x for path, x in flat.items()}
        ), state

    return optax.GradientTransformation(optimizer.init, update)


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether any regex is found anywhere in a parameter's path."""
    return any(re.search(pattern, path) for pattern in patterns)


def update_ema(ema: Params, params: Params, step: Array, decay: float) -> Params:
    """One step of the moving average, in the type of `ema`.

    The decay is min(decay, (1 + step) / (10 + step)): short at first, so that the average forgets the
    initial weights.
    """
    # Not optax.incremental_update: its sum of two parts changes what is equal, as frozen weights are.
    rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - rate) * (p - e), ema, params)


def split_frozen(params: Params, freeze: Iterable[str]) -> tuple[Params, Params]:
    """Splits parameters into (trainable, frozen) by regexes on their paths (`a.0.kernel`).

    A parameter is frozen if any regex is found anywhere in its path.
    """
    patterns = tuple(freeze)
    if not patterns:
        return params, {}

    flat = trees.flatten(params)
    fixed = {path for path in flat if _matches(path, patterns)}
    return (
        trees.unflatten({path: x for path, x in flat.items() if path not in fixed}),
        trees.unflatten({path: flat[path] for path in fixed}),
    )


def join_frozen(trainable: Params, fixed: Params) -> Params:
    """Merges what `split_frozen` returned."""
    if not fixed:
        return trainable
    return trees.unflatten(trees.flatten(trainable) | trees.flatten(fixed))


def check_freeze(params: Params, freeze: Iterable[str]) -> None:
    """Raises UserError if a regex of `config.optim.freeze` matches no parameter, or all are matched."""
    paths = list(trees.flatten(params))
    for pattern in freeze:
        if not any(re.search(pattern, path) for path in paths):
            # A typed name may be any folder of the tree, so
            # the nearest one is sought among all prefixes.
            parts = dict.fromkeys(
                ".".join(path.split(".")[:end])
                for path in paths
                for end in range(1, path.count(".") + 2)
            )
            hint = nearest(re.sub(r"[\\^$*+?()|\[\]]", "", pattern), parts)
            raise UserError(
                f"config.optim.freeze: {pattern!r} matches no parameter{hint}; "
                f"parameters are below {', '.join(params)}"
            )

    if not split_frozen(params, freeze)[0]:
        raise UserError("config.optim.freeze: matches every parameter, nothing is left to train")
