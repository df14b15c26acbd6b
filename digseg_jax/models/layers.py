# SPDX-License-Identifier: Apache-2.0
"""Layers with torch's semantics, NHWC: paddings and epsilons are always explicit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TypedDict

import jax
import jax.numpy as jnp
from flax import nnx

from digseg_jax.arraytypes import Array, DTypeLike, Float, Real
from digseg_jax.models.kernels import conv as cpu_conv
from digseg_jax.models.kernels.attention import AttentionFn
from digseg_jax.models.kernels.conv import xla_conv
from digseg_jax.models.kernels.feed_forward import FeedForwardFn
from digseg_jax.models.kernels.group_norm import group_norm
from digseg_jax.models.kernels.upsample import doubled_conv, upsample_nearest

WeightsFn = Callable[[Array], Array]


def as_it_is(kernel: Array) -> Array:
    """Returns the kernel unchanged: the default of `Compute.weights`."""
    return kernel


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model computes its results, which are the same up to rounding whatever is chosen.

    Attributes:
      dtype: type of activations; norms, softmax and timestep embeddings stay in float32.
      conv: "xla": `lax.conv_general_dilated`; "cpu": fewer products, see `models.kernels.conv`, and for
        upsampled maps `models.kernels.upsample`. On a TPU that would cost more traffic than it saves.
        `models.feed_forward.GEGLU` distinguishes the two as well.
      attention: a name or a function, see `models.attention.attention`.
      remat: what the backward pass recomputes, see `models.remat`.
      weights: applied to each kernel where it is used, after its conversion to `dtype`; here sharded
        kernels are gathered.
      feed_forward: a function of (x, up, up_bias, down, down_bias), used in place of separate layers
        where `models.kernels.feed_forward.takes` accepts the map.
    """

    dtype: DTypeLike = jnp.float32
    conv: str = "xla"
    attention: str | AttentionFn = "plain"
    remat: str = "none"
    weights: WeightsFn = as_it_is
    feed_forward: FeedForwardFn | None = None


class Shared(TypedDict):
    """Arguments that a model passes to each of its layers."""

    compute: Compute
    rngs: nnx.Rngs


class Conv(nnx.Module):
    """2-D convolution with a kernel [h, w, in, out].

    Args:
      in_features, out_features: channels.
      size: side of the kernel.
      stride: step in both directions.
      padding: ((top, bottom), (left, right)); None keeps the size at stride 1.
      use_bias: add a bias.
      doubled: convolve the map upsampled to twice its size (nearest neighbor); needs the default 3x3
        kernel, stride and padding.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        size: int = 3,
        *,
        stride: int = 1,
        padding: tuple[tuple[int, int], tuple[int, int]] | None = None,
        use_bias: bool = True,
        doubled: bool = False,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        # torch's default initialization: uniform with variance 1 / (3 fan_in).
        init = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.kernel = nnx.Param(init(rngs.params(), (size, size, in_features, out_features)))
        if use_bias:
            self.bias = nnx.Param(jnp.zeros((out_features,)))

        # Explicit padding: XLA's "SAME" pads on other sides than torch where the stride is 2.
        self.stride = stride
        half = (size - 1) // 2
        self.padding = padding if padding is not None else ((half, half), (half, half))
        self.doubled, self.compute = doubled, compute

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        dtype = self.compute.dtype
        x, kernel = x.astype(dtype), self.compute.weights(self.kernel[...].astype(dtype))

        # The CPU's kernels take stride 1 and float32 only: in 16 bits, Winograd's sums lose digits.
        ours = self.compute.conv == "cpu" and self.stride == 1 and dtype == jnp.float32
        if ours and self.doubled:
            y = doubled_conv(x, kernel)
        elif ours:
            y = cpu_conv.conv(x, kernel, self.padding)
        else:
            y = xla_conv(upsample_nearest(x) if self.doubled else x, kernel, self.padding, self.stride)

        return y + self.bias[...].astype(dtype) if hasattr(self, "bias") else y


class GroupNorm(nnx.Module):
    """Group normalization over the last axis; statistics are float32 in every compute type."""

    def __init__(self, features: int, groups: int, *, eps: float, compute: Compute):
        self.scale = nnx.Param(jnp.ones((features,)))
        self.bias = nnx.Param(jnp.zeros((features,)))
        self.groups, self.eps, self.compute = groups, eps, compute

    def __call__(
        self, x: Float[Array, "b *space c"], *, silu: bool = False
    ) -> Float[Array, "b *space c"]:
        """Normalizes; silu: applies that activation too, which follows almost every norm here."""
        scale, bias = self.scale[...], self.bias[...]
        return group_norm(x, scale, bias, self.groups, self.eps, silu, self.compute.dtype)


class Linear(nnx.Module):
    """Dense layer with a kernel [in, out] and torch's initial variance."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, compute: Compute, rngs: nnx.Rngs
    ):
        init = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.kernel = nnx.Param(init(rngs.params(), (in_features, out_features)))
        if bias:
            self.bias = nnx.Param(jnp.zeros((out_features,)))
        self.compute = compute

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b d"]:
        # Parameters are stored in float32 and converted where they are used.
        dtype = self.compute.dtype
        y = x.astype(dtype) @ self.weights()
        return y + self.bias[...].astype(dtype) if hasattr(self, "bias") else y

    def weights(self) -> Float[Array, "c d"]:
        """Returns the kernel in the dtype of the activations, gathered if it is sharded."""
        return self.compute.weights(self.kernel[...].astype(self.compute.dtype))


def linear(
    in_features: int, out_features: int, *, bias: bool = True, compute: Compute, rngs: nnx.Rngs
) -> Linear:
    """Builds a `Linear` that has a bias by default."""
    return Linear(in_features, out_features, bias=bias, compute=compute, rngs=rngs)


def layer_norm(features: int, *, compute: Compute, rngs: nnx.Rngs, eps: float = 1e-5) -> nnx.LayerNorm:
    """Builds a layer normalization; flax keeps its statistics in float32."""
    return nnx.LayerNorm(features, epsilon=eps, dtype=compute.dtype, use_fast_variance=False, rngs=rngs)


def timestep_embedding(
    timestep: Real[Array, "b"], width: int, *, flip_sin_to_cos: bool, freq_shift: float
) -> Float[Array, "b width"]:
    """Embeds timesteps as sinusoids, float32 (diffusers: `embeddings.py:get_timestep_embedding`)."""
    # Float32 throughout: bfloat16 cannot tell neighboring timesteps of a thousand apart.
    half = width // 2
    exponent = -math.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angle = timestep.astype(jnp.float32)[:, None] * jnp.exp(exponent)[None, :]

    # Stable Diffusion has the cosines first. An odd width gets a zero at its end.
    parts = [jnp.cos(angle), jnp.sin(angle)] if flip_sin_to_cos else [jnp.sin(angle), jnp.cos(angle)]
    embedding = jnp.concatenate(parts, axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, width - 2 * half)))
