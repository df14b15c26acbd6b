# SPDX-License-Identifier: Apache-2.0
"""The feed-forward part of a transformer block: a Pallas kernel for TPUs, and a backward one.

The hidden maps are eight times as wide as the input. Written to main memory, kept or recomputed for
the backward pass, and read there, they make up most of a transformer block's traffic. Here a block of
positions goes through both layers while the layers' kernels stay in the chip's own memory, where their
gradients are summed too. That pays, and fits, where a map has more positions than channels.

Shapes: x [n, c]; up [c, 2 h] and up_bias [2 h], the value's half before the gate's; down [h, c] and
down_bias [c].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from digseg_jax.arraytypes import Array, Float
from digseg_jax.models.kernels.pallas import call, product

FeedForwardFn = Callable[[Array, Array, Array, Array, Array], Array]

ROWS = (512, 256, 128)  # positions at a time
HIDDEN = 256  # hidden channels at a time; unrolled over all, compiling takes ten times as long
LANES = 128  # of a register; blocks of channels are multiples
MAX_FEATURES = 640  # with 1280 the kernels and their gradients would not fit into the chip's memory
MEMORY = 60 * 2**20  # bytes at most, of the chip's 64 MiB (v5p) or 128 MiB (v5e, v6e)


def takes(length: int, features: int, hidden: int) -> bool:
    """True if the kernel can take a map [*, length, features], and pays."""
    rows = length % ROWS[-1] == 0 and length > features
    return rows and features <= MAX_FEATURES and hidden % LANES == 0


def fused(
    x: Float[Array, "n c"],
    up: Float[Array, "c h2"],
    up_bias: Float[Array, "h2"],
    down: Float[Array, "h c"],
    down_bias: Float[Array, "c"],
    *,
    interpret: bool = False,
) -> Float[Array, "n c"]:
    """Computes (value * gelu(gate)) @ down + down_bias with the exact GELU.

    (value, gate) = x @ up + up_bias. Products in the arrays' dtype are summed in float32, and
    everything between them is float32.

    Args:
      interpret: run the kernel's semantics on any platform, slowly; for tests.

    Raises:
      ValueError: n is not a multiple of 128.
    """
    if len(x) % ROWS[-1]:
        raise ValueError(f"{len(x)} positions; legal: multiples of {ROWS[-1]}")

    # Biases become rows: blocks have two axes.
    return _fused(interpret, x, up, up_bias[None], down, down_bias[None])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(interpret: bool, *arrays: Array) -> Array:
    """Runs the kernel on x and the four weights, block by block of positions."""
    x, *weights = arrays
    rows, whole = _specs(x, weights)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    run = call(
        _forward,
        "feed_forward_forward",
        [rows, *whole],
        rows,
        shape,
        grid=_grid(x, rows),
        memory=MEMORY,
        interpret=interpret,
    )
    return run(x, *weights)


def _fused_forward(interpret: bool, *arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    return _fused(interpret, *arrays), arrays


def _fused_backward(interpret: bool, arrays: tuple[Array, ...], dy: Array) -> tuple[Array, ...]:
    x, *weights = arrays
    rows, whole = _specs(x, weights)

    # Gradients of x come block by block; those of the weights whole and in float32, as they are sums.
    shapes = [jax.ShapeDtypeStruct(w.shape, jnp.float32) for w in weights]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype), *shapes]
    run = call(
        _backward,
        "feed_forward_backward",
        [rows, rows, *whole[:3]],
        [rows, *whole],
        shapes,
        grid=_grid(x, rows),
        memory=MEMORY,
        interpret=interpret,
    )

    # The last bias is not read: its gradient needs dy alone.
    found = run(x, dy, *weights[:3])
    return tuple(g.astype(a.dtype) for g, a in zip(found, arrays, strict=True))


_fused.defvjp(_fused_forward, _fused_backward)


def _specs(x: Array, weights: list[Array]) -> tuple[Any, list[Any]]:
    """Blocks for the kernel: some positions at a time; the weights whole, loaded once."""
    from jax.experimental import pallas as pl  # here: useless elsewhere, and costs start-up time

    size = next(size for size in ROWS if len(x) % size == 0)
    rows = pl.BlockSpec((size, x.shape[1]), lambda i: (i, 0))
    return rows, [pl.BlockSpec(w.shape, lambda i: (0, 0)) for w in weights]


def _grid(x: Array, rows: Any) -> tuple[int]:
    """Number of blocks of positions."""
    return (len(x) // rows.block_shape[0],)


def _forward(x: Any, up: Any, up_bias: Any, down: Any, down_bias: Any, y: Any) -> None:
    """The kernel: y of one block of positions, summed over parts of the hidden channels."""
    block, size = x[...], _hidden_size(down)

    def add(i: Array, total: Array) -> Array:
        """Adds part i of the hidden channels to the sum."""
        value, gate = _halves(block, up, up_bias, i * size, size)
        hidden = value * gate * _normal_cdf(gate)
        return total + product(hidden.astype(block.dtype), down[_part(i * size, size)], 1, 0)

    start = jnp.zeros(block.shape, jnp.float32) + down_bias[...].astype(jnp.float32)
    y[...] = jax.lax.fori_loop(0, down.shape[0] // size, add, start).astype(y.dtype)


def _backward(
    x: Any, dy: Any, up: Any, up_bias: Any, down: Any,
    dx: Any, d_up: Any, d_up_bias: Any, d_down: Any, d_down_bias: Any,
) -> None:  # fmt: skip
    """The backward kernel: dx of one block; the weights' gradients are summed over the blocks."""
    from jax.experimental import pallas as pl

    # The first block starts the sums of the weights' gradients.
    @pl.when(pl.program_id(0) == 0)
    def _() -> None:
        for total in (d_up, d_up_bias, d_down, d_down_bias):
            total[...] = jnp.zeros_like(total)

    # The hidden map is recomputed, one part of its channels at a time.
    block, dy_block, size = x[...], dy[...], _hidden_size(down)
    dtype, width = block.dtype, down.shape[0]

    def add(i: Array, total: Array) -> Array:
        here = _part(i * size, size)
        value, gate = _halves(block, up, up_bias, i * size, size)
        cdf = _normal_cdf(gate)
        gelu, density = gate * cdf, jnp.exp(-0.5 * gate * gate) * (2 * math.pi) ** -0.5

        # Through `down`, then through the gated activation: gelu'(g) = cdf + g * density.
        d_down[here] += product((value * gelu).astype(dtype), dy_block, 0, 0)
        d_hidden = product(dy_block, down[here], 1, 1)
        d_halves = (d_hidden * gelu, d_hidden * value * (cdf + gate * density))

        # Through the two halves of `up`.
        for start, gradient in zip((i * size, width + i * size), d_halves, strict=True):
            half = (slice(None), _part(start, size))
            d_up_bias[half] += gradient.sum(axis=0, keepdims=True)
            gradient = gradient.astype(dtype)
            d_up[half] += product(block, gradient, 0, 0)
            total += product(gradient, up[half], 1, 1)
        return total

    start = jnp.zeros(block.shape, jnp.float32)
    dx[...] = jax.lax.fori_loop(0, width // size, add, start).astype(dx.dtype)
    d_down_bias[...] += dy_block.astype(jnp.float32).sum(axis=0, keepdims=True)


def _halves(x: Array, up: Any, up_bias: Any, start: Array, size: int) -> list[Array]:
    """Value and gate of `size` hidden channels from `start` on, float32 [rows, size] each."""
    width = up.shape[1] // 2
    parts = [(slice(None), _part(first, size)) for first in (start, width + start)]
    return [product(x, up[p], 1, 0) + up_bias[p].astype(jnp.float32) for p in parts]


def _part(start: Array, size: int) -> Any:
    """A slice of channels that the compiler knows to begin at a multiple of the lanes."""
    from jax.experimental import pallas as pl

    return pl.ds(pl.multiple_of(start, LANES), size)


def _hidden_size(down: Any) -> int:
    """Number of hidden channels that are computed at a time."""
    return HIDDEN if down.shape[0] % HIDDEN == 0 else LANES


def _normal_cdf(x: Array) -> Array:
    """Cumulative distribution of the standard normal, the exact GELU's gate."""
    return 0.5 * (1 + jax.lax.erf(x * 2**-0.5))
