# SPDX-License-Identifier: Apache-2.0
"""Group normalization with an optional SiLU, and a gradient of its own, to save memory traffic.

Sums are taken over positions first, so that only [b, c] numbers are regrouped: splitting 320 channels
into 32 groups of 10 would move a whole map on a TPU, whose registers have 128 lanes. The backward pass
keeps only the input and recomputes the rest from it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from digseg_jax.arraytypes import Array, Float
from digseg_jax.models import remat

F32 = jnp.float32


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def group_norm(
    x: Float[Array, "b *space c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    groups: int,
    eps: float,
    silu: bool,
    dtype: Any,
) -> Float[Array, "b *space c"]:
    """Computes silu(normalized x * scale + bias) in float32; the result has `dtype`.

    Statistics take one pass (two took four times as long on a CPU): the mean of squares minus the
    square of the mean. For 16-bit inputs the cancellation is far below their own rounding; float32
    inputs are shifted beforehand, each channel by the mean of the middle row.
    """
    return _forward(x, scale, bias, groups, eps, silu, dtype)[0]


def _forward(
    x: Array, scale: Array, bias: Array, groups: int, eps: float, silu: bool, dtype: Any
) -> tuple[Array, tuple[Array, ...]]:
    """The result, and what the backward pass needs: the input, the parameters, the statistics."""
    mean, rstd = (remat.kept(a) for a in _statistics(x, groups, eps))
    y = _wide((x.astype(F32) - _over(mean, x)) * _over(rstd, x), scale, bias)
    y = y * jax.nn.sigmoid(y) if silu else y
    return y.astype(dtype), (x, scale, bias, mean, rstd)


def _backward(
    groups: int, eps: float, silu: bool, dtype: Any, kept: tuple[Array, ...], gradient: Array
) -> tuple[Array, Array, Array]:
    """Gradients of x, scale and bias."""
    x, scale, bias, mean, rstd = kept
    space = _space(x)

    # Normalize again, and go back through the activation.
    positions = x[0, ..., 0].size
    normal = (x.astype(F32) - _over(mean, x)) * _over(rstd, x)
    gradient = gradient.astype(F32)
    if silu:
        y = _wide(normal, scale, bias)
        share = jax.nn.sigmoid(y)
        gradient = gradient * share * (1.0 + y * (1.0 - share))

    # Sums over positions: the gradients of bias and scale, and what the statistics need.
    if x.dtype == F32:
        sums, products = _two_sums(gradient, gradient * normal)  # b c
    else:  # the program whose memory traffic on TPUs was measured
        sums, products = gradient.sum(axis=space), (gradient * normal).sum(axis=space)

    # Through mean and deviation, which all channels of a group share.
    offset = _group_mean(sums * scale / positions, groups)
    slope = _group_mean(products * scale / positions, groups)
    through = gradient * scale - _over(offset, x) - normal * _over(slope, x)

    return (
        (_over(rstd, x) * through).astype(x.dtype),
        products.sum(axis=0).astype(scale.dtype),
        sums.sum(axis=0).astype(bias.dtype),
    )


group_norm.defvjp(_forward, _backward)


def _statistics(x: Array, groups: int, eps: float) -> tuple[Array, Array]:
    """Mean and 1 / deviation of each group, repeated for its channels: [b, c] each."""
    space, positions = _space(x), x[0, ..., 0].size

    # 16-bit inputs: their own rounding is larger than the cancellation in the variance.
    if x.dtype != F32:
        wide = x.astype(F32)
        mean = _group_mean(wide.mean(axis=space), groups)
        squares = _group_mean(jnp.square(wide).mean(axis=space), groups)
        variance = jnp.maximum(squares - jnp.square(mean), 0.0)
        return mean, jax.lax.rsqrt(variance + eps)

    # Shift each channel near its mean, so that the difference of squares does not cancel.
    middle = x[:, x.shape[1] // 2]
    shift = middle.mean(axis=tuple(range(1, middle.ndim - 1)))  # b c
    shifted = x - _over(shift, x)
    sums, squares = _two_sums(shifted, jnp.square(shifted))

    # Statistics of each channel, then of the group: variances within, and between the means.
    offset = sums / positions
    own_mean = shift + offset
    own_variance = jnp.maximum(squares / positions - jnp.square(offset), 0.0)
    mean = _group_mean(own_mean, groups)
    variance = _group_mean(own_variance + jnp.square(own_mean - mean), groups)
    return mean, jax.lax.rsqrt(variance + eps)


def _two_sums(
    x: Float[Array, "b *space c"], y: Float[Array, "b *space c"]
) -> tuple[Float[Array, "b c"], Float[Array, "b c"]]:
    """Sums both over positions in one loop; XLA on CPUs would read the map once for each sum."""

    def add(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return a[0] + b[0], a[1] + b[1]

    zero = jnp.zeros((), x.dtype)
    rows = jax.lax.reduce((x, y), (zero, zero), add, (x.ndim - 2,))
    rest = tuple(range(1, x.ndim - 2))
    return rows[0].sum(axis=rest), rows[1].sum(axis=rest)


def _group_mean(values: Float[Array, "b c"], groups: int) -> Float[Array, "b c"]:
    """Mean over each group of channels, repeated for its channels."""
    b, c = values.shape
    mean = values.reshape(b, groups, -1).mean(axis=-1, keepdims=True)
    return jnp.broadcast_to(mean, (b, groups, c // groups)).reshape(b, c)


def _wide(normal: Array, scale: Array, bias: Array) -> Array:
    """Scale and shift of the normalized map, in float32."""
    return normal * scale.astype(F32) + bias.astype(F32)


def _over(values: Float[Array, "b c"], x: Array) -> Array:
    """Shapes [b, c] to broadcast over the positions of x."""
    return jnp.expand_dims(values, _space(x))


def _space(x: Array) -> tuple[int, ...]:
    """Axes of the positions."""
    return tuple(range(1, x.ndim - 1))
