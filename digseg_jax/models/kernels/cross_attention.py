# SPDX-License-Identifier: Apache-2.0
"""Attention to the few keys of a text: a Pallas kernel for TPUs, and one for its backward pass.

All keys of an example fit into the chip's own memory, so the whole softmax of a block of queries is
computed there: no weight is written to main memory or kept for the backward pass. Heads stay in the
channels, where the projections put them: nothing is transposed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from digseg_jax.arraytypes import Array, Bool, Float
from digseg_jax.models.kernels.pallas import call, product
from digseg_jax.models.remat import kept

KEYS = 128  # the most keys, as many as a register has lanes; fewer are padded
ROWS = (256, 128)  # queries at a time
LOWEST = float(jnp.finfo(jnp.float32).min)  # finite: with -inf, a row of masked keys would be nan


def takes(length: int, keys: int) -> bool:
    """True if the kernel can take that many queries and keys of an example."""
    return keys <= KEYS and length % ROWS[-1] == 0


def few_keys(
    q: Float[Array, "b l heads d"],
    k: Float[Array, "b m heads d"],
    v: Float[Array, "b m heads d"],
    mask: Bool[Array, "b m"] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "b l heads d"]:
    """Computes `kernels.attention.plain` where `takes` allows it.

    Args:
      interpret: run the kernel's semantics on any platform, slowly; for tests.
    """
    heads, keys = q.shape[2], k.shape[1]
    valid = jnp.ones(k.shape[:2], bool) if mask is None else mask

    # Added to the logits. If all keys are masked they weigh the same; padding never weighs anything.
    bias = jnp.where(valid, 0.0, LOWEST / 2).astype(jnp.float32)
    bias = jnp.pad(bias, ((0, 0), (0, KEYS - keys)), constant_values=LOWEST)[:, None]

    # Heads and their channels become one axis, which is how the projections have them in memory.
    padding = ((0, 0), (0, KEYS - keys), (0, 0))
    k, v = (jnp.pad(a.reshape(*a.shape[:2], -1), padding) for a in (k, v))
    y = _attend(heads, interpret, q.reshape(*q.shape[:2], -1), k, v, bias)
    return kept(y).reshape(q.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(heads: int, interpret: bool, q: Array, k: Array, v: Array, bias: Array) -> Array:
    """Runs the kernel on q [b, l, heads * d], k and v [b, KEYS, heads * d], bias [b, 1, KEYS]."""
    rows, whole, row = _specs(q)
    shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
    specs, grid = [rows, whole, whole, row], _grid(q, rows)
    kernel, name = partial(_forward, heads), "cross_attention_forward"
    run = call(kernel, name, specs, rows, shape, grid=grid, parallel=1, interpret=interpret)
    return run(q, k, v, bias)


def _attend_forward(heads: int, interpret: bool, *arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    return _attend(heads, interpret, *arrays), arrays


def _attend_backward(
    heads: int, interpret: bool, arrays: tuple[Array, ...], dy: Array
) -> tuple[Array, ...]:
    """Runs the backward kernel; the bias has no gradient, because it comes from the mask."""
    q, k, v, bias = arrays
    rows, whole, row = _specs(q)

    # Gradients of k and v are sums over blocks of queries, hence float32.
    sums = jax.ShapeDtypeStruct(k.shape, jnp.float32)
    shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype), sums, sums]

    # Blocks of one example run in order, because they sum into one result; examples in any order.
    specs, results = [rows, rows, whole, whole, row], [rows, whole, whole]
    kernel, name, grid = partial(_backward, heads), "cross_attention_backward", _grid(q, rows)
    run = call(kernel, name, specs, results, shapes, grid=grid, parallel=1, interpret=interpret)
    dq, dk, dv = run(q, dy, k, v, bias)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), jnp.zeros_like(bias)


_attend.defvjp(_attend_forward, _attend_backward)


def _specs(q: Array) -> tuple[Any, Any, Any]:
    """Blocks for the kernel: some queries of an example at a time, all of its keys, its bias."""
    from jax.experimental import pallas as pl  # here: useless elsewhere, and costs start-up time

    size, width = next(size for size in ROWS if q.shape[1] % size == 0), q.shape[2]
    rows = pl.BlockSpec((None, size, width), lambda b, i: (b, i, 0))
    whole = pl.BlockSpec((None, KEYS, width), lambda b, i: (b, 0, 0))
    return rows, whole, pl.BlockSpec((None, 1, KEYS), lambda b, i: (b, 0, 0))


def _grid(q: Array, rows: Any) -> tuple[int, int]:
    """Number of examples, and of blocks of queries in each."""
    return q.shape[0], q.shape[1] // rows.block_shape[1]


def _forward(heads: int, q: Any, k: Any, v: Any, bias: Any, y: Any) -> None:
    """The kernel: y from one block of queries, head by head."""
    for part in _parts(q, heads):
        weights, total = _weights(q[:, part], k[:, part], bias[...])
        found = product(weights.astype(v.dtype), v[:, part], 1, 0)
        y[:, part] = (found / total).astype(y.dtype)


def _backward(
    heads: int, q: Any, dy: Any, k: Any, v: Any, bias: Any, dq: Any, dk: Any, dv: Any
) -> None:
    """The backward kernel: dq of one block; dk and dv are summed over an example's blocks."""
    from jax.experimental import pallas as pl

    # The first block of an example starts its sums.
    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        dk[...], dv[...] = jnp.zeros_like(dk), jnp.zeros_like(dv)

    for part in _parts(q, heads):
        q_part, k_part, dy_part = q[:, part], k[:, part], dy[:, part]
        weights, total = _weights(q_part, k_part, bias[...])
        weights = weights / total  # recomputed: the forward pass keeps none

        # Through the product with v, then through the softmax.
        dv[:, part] += product(weights.astype(v.dtype), dy_part, 0, 0)
        d_weights = product(dy_part, v[:, part], 1, 1)
        mean = (weights * d_weights).sum(axis=1, keepdims=True)
        d_logits = weights * (d_weights - mean) * q_part.shape[1] ** -0.5

        # If a text has no valid key, masked keys have weights, but their logits are constants.
        d_logits = jnp.where(bias[...] == 0, d_logits, 0.0).astype(q.dtype)
        dq[:, part] = product(d_logits, k_part, 1, 0).astype(dq.dtype)
        dk[:, part] += product(d_logits, q_part, 0, 0)


def _parts(q: Any, heads: int) -> list[slice]:
    """Channels of each head."""
    width = q.shape[1] // heads
    return [slice(h * width, (h + 1) * width) for h in range(heads)]


def _weights(q: Array, k: Array, bias: Array) -> tuple[Array, Array]:
    """Softmax's numerators [rows, keys] and denominator [rows, 1], float32, of one head."""
    logits = product(q, k, 1, 1) * q.shape[1] ** -0.5 + bias
    weights = jnp.exp(logits - logits.max(axis=1, keepdims=True))
    return weights, weights.sum(axis=1, keepdims=True)
