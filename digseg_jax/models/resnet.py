# SPDX-License-Identifier: Apache-2.0
"""Residual block and resampling shared by U-Net and VAE (diffusers: `resnet.py`)."""

from __future__ import annotations

import jax
from flax import nnx

from digseg_jax.arraytypes import Array, Float
from digseg_jax.models import remat
from digseg_jax.models.layers import Compute, Conv, GroupNorm, linear


class ResnetBlock2D(nnx.Module):
    """Residual block: norm, SiLU, conv, (+ time), norm, SiLU, conv, + shortcut."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        groups: int,
        eps: float,
        time_features: int | None = None,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        self.norm1 = GroupNorm(in_features, groups, eps=eps, compute=compute)
        self.conv1 = Conv(in_features, out_features, compute=compute, rngs=rngs)

        # The U-Net's blocks know the timestep, the autoencoder's do not.
        if time_features is not None:
            self.time_emb_proj = linear(time_features, out_features, compute=compute, rngs=rngs)

        self.norm2 = GroupNorm(out_features, groups, eps=eps, compute=compute)
        self.conv2 = Conv(out_features, out_features, compute=compute, rngs=rngs)
        self.compute = compute

        # A 1x1 convolution where the input has another width than what is added to it.
        if in_features != out_features:
            self.conv_shortcut = Conv(in_features, out_features, 1, compute=compute, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], time: Float[Array, "b t"] | None = None
    ) -> Float[Array, "b h w d"]:
        return remat.block(self._residual, self.compute.remat)(x, time)

    def _residual(self, x: Array, time: Array | None) -> Array:
        """The block without rematerialization; the module's call wraps it."""
        # Kept for the backward pass: the small projection of the timestep, and the first convolution,
        # the most expensive result to recompute.
        y = self.conv1(self.norm1(x, silu=True))
        if time is not None:
            y = y + remat.kept(self.time_emb_proj(jax.nn.silu(time)))[:, None, None, :]
        y = self.conv2(self.norm2(remat.kept(y), silu=True))

        return (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x) + y


class Downsample2D(nnx.Module):
    """Convolution with stride 2, which halves the map.

    The U-Net pads all four sides, the autoencoder right and bottom only (`asymmetric`).
    """

    def __init__(self, features: int, *, asymmetric: bool, compute: Compute, rngs: nnx.Rngs):
        side = (0, 1) if asymmetric else (1, 1)
        self.conv = Conv(features, features, stride=2, padding=(side, side), compute=compute, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Nearest-neighbor upsampling by 2, then a convolution."""

    def __init__(self, features: int, *, compute: Compute, rngs: nnx.Rngs):
        self.conv = Conv(features, features, doubled=True, compute=compute, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
        return self.conv(x)
