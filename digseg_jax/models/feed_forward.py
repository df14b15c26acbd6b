# SPDX-License-Identifier: Apache-2.0
"""The feed-forward part of a transformer block (diffusers: `attention.py`)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from digseg_jax.arraytypes import Array, Float
from digseg_jax.models import remat
from digseg_jax.models.kernels import feed_forward
from digseg_jax.models.layers import Compute, Shared, linear


class GEGLU(nnx.Module):
    """Linear to twice the width; one half gates the other through the exact GELU."""

    def __init__(self, features: int, hidden: int, *, compute: Compute, rngs: nnx.Rngs):
        self.proj = linear(features, 2 * hidden, compute=compute, rngs=rngs)

    def __call__(self, x: Float[Array, "b l c"]) -> Float[Array, "b l hidden"]:
        value, gate = self._halves(x)
        return value * jax.nn.gelu(gate, approximate=False)

    def _halves(self, x: Float[Array, "b l c"]) -> list[Array]:
        """Value and gate, [b, l, hidden] each."""
        compute = self.proj.compute
        if compute.conv == "cpu":  # halves of a kernel would be copies there
            return jnp.split(self.proj(x), 2, axis=-1)

        # The kernel is split, not its product: the gate's product then ends in the activation, and the
        # two halves never lie in memory as one array (a sixth of a transformer block's traffic on TPU).
        x, bias = x.astype(compute.dtype), self.proj.bias[...].astype(compute.dtype)
        halves = zip(jnp.split(self.proj.weights(), 2, axis=1), jnp.split(bias, 2), strict=True)
        return [x @ half + offset for half, offset in halves]


class FeedForward(nnx.Module):
    """GEGLU and a linear layer; index 1 of `net` is torch's dropout, which has no parameters."""

    def __init__(self, features: int, *, compute: Compute, rngs: nnx.Rngs):
        options: Shared = {"compute": compute, "rngs": rngs}
        self.net: nnx.List[Any] = nnx.List(
            [
                GEGLU(features, 4 * features, **options),
                nnx.Module(),
                linear(4 * features, features, **options),
            ]
        )
        self.compute, self.features = compute, features

    def __call__(self, x: Float[Array, "b l c"]) -> Float[Array, "b l c"]:
        fused, up, down = self.compute.feed_forward, self.net[0].proj, self.net[2]
        if not fused or not feed_forward.takes(x.shape[1], self.features, 4 * self.features):
            return down(self.net[0](x))

        # Both layers in one kernel. The result is an eighth of the hidden map, so it is kept for the
        # backward pass.
        x = x.astype(self.compute.dtype)
        y = fused(x, up.weights(), up.bias[...], down.weights(), down.bias[...])
        return remat.kept(y)
