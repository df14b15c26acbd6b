# SPDX-License-Identifier: Apache-2.0
"""Down, mid and up blocks of the conditional U-Net (diffusers: `unet_2d_blocks.py`)."""

from __future__ import annotations

from typing import Any, Unpack

import jax.numpy as jnp
from flax import nnx

from digseg_jax.arraytypes import Array, Bool, Float
from digseg_jax.models.attention import Transformer2DModel
from digseg_jax.models.layers import Compute, Shared
from digseg_jax.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D


class _Level(nnx.Module):
    """Base of the three kinds of block: resnets, each optionally followed by a transformer."""

    resnets: nnx.List[ResnetBlock2D]
    attentions: nnx.List[Transformer2DModel]

    def _add_resnet(
        self, cin: int, cout: int, config: Any, time_features: int, **options: Unpack[Shared]
    ) -> None:
        """Appends a resnet from `cin` to `cout` channels."""
        self.resnets.append(
            ResnetBlock2D(
                cin,
                cout,
                groups=config.norm_num_groups,
                eps=config.norm_eps,
                time_features=time_features,
                **options,
            )
        )

    def _add_attention(self, features: int, heads: int, config: Any, **options: Unpack[Shared]) -> None:
        """Appends a transformer behind the resnet that was added last."""
        self.attentions.append(
            Transformer2DModel(
                features,
                config.cross_attention_dim,
                heads,
                layers=config.transformer_layers_per_block,
                groups=config.norm_num_groups,
                linear_projection=config.use_linear_projection,
                prompt_length=config.prompt_length,
                text_features=config.text_features,
                **options,
            )
        )


class DownBlock(_Level):
    """Resnets (each with a transformer if `heads` is given), then an optional downsampling."""

    def __init__(
        self,
        cin: int,
        cout: int,
        *,
        config: Any,
        layers: int,
        heads: int | None,
        downsample: bool,
        time_features: int,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        options: Shared = {"compute": compute, "rngs": rngs}
        self.resnets = nnx.List([])
        if heads is not None:
            self.attentions = nnx.List([])

        # Only the first resnet changes the width.
        for i in range(layers):
            self._add_resnet(cin if i == 0 else cout, cout, config, time_features, **options)
            if heads is not None:
                self._add_attention(cout, heads, config, **options)

        if downsample:
            self.downsamplers = nnx.List([Downsample2D(cout, asymmetric=False, **options)])

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        time: Float[Array, "b t"],
        context: Float[Array, "b l d"],
        mask: Bool[Array, "b l"] | None,
    ) -> tuple[Array, list[Array]]:
        """Returns the block's result and every intermediate one, for the skip connections."""
        # One skip per resnet, and one of the downsampled map: the next level's up block takes it last.
        outputs = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, context, mask)
            outputs.append(x)

        if hasattr(self, "downsamplers"):
            x = self.downsamplers[0](x)
            outputs.append(x)
        return x, outputs


class MidBlock(_Level):
    """Resnet, transformer, resnet at the lowest resolution."""

    def __init__(
        self,
        features: int,
        *,
        config: Any,
        heads: int,
        time_features: int,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        options: Shared = {"compute": compute, "rngs": rngs}
        self.resnets, self.attentions = nnx.List([]), nnx.List([])

        # Two resnets around one transformer, as `__call__` uses them.
        for _ in range(2):
            self._add_resnet(features, features, config, time_features, **options)
        self._add_attention(features, heads, config, **options)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        time: Float[Array, "b t"],
        context: Float[Array, "b l d"],
        mask: Bool[Array, "b l"] | None,
    ) -> Float[Array, "b h w c"]:
        x = self.resnets[0](x, time)
        x = self.attentions[0](x, context, mask)
        return self.resnets[1](x, time)


class UpBlock(_Level):
    """Resnets, each on the map concatenated with a skip connection, then an optional upsampling.

    Args:
      skip_cin: channels of the last skip, which comes from the next higher resolution.
      cin: channels of the map from the block below.
      cout: channels of the result.
      config: the U-Net's.
      layers: resnets of the down block at this resolution; here there is one more.
      heads: attention heads; None: no transformers.
      upsample: double the resolution at the end.
      time_features: channels of the timestep's embedding.
    """

    def __init__(
        self,
        skip_cin: int,
        cin: int,
        cout: int,
        *,
        config: Any,
        layers: int,
        heads: int | None,
        upsample: bool,
        time_features: int,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        options: Shared = {"compute": compute, "rngs": rngs}
        self.resnets = nnx.List([])
        if heads is not None:
            self.attentions = nnx.List([])

        # One resnet more than on the way down, one for each skip; the last skip is the next level's.
        for i in range(layers + 1):
            skip = skip_cin if i == layers else cout
            width = cin if i == 0 else cout
            self._add_resnet(width + skip, cout, config, time_features, **options)
            if heads is not None:
                self._add_attention(cout, heads, config, **options)

        if upsample:
            self.upsamplers = nnx.List([Upsample2D(cout, **options)])

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        skips: list[Array],
        time: Float[Array, "b t"],
        context: Float[Array, "b l d"],
        mask: Bool[Array, "b l"] | None,
    ) -> Float[Array, "b h2 w2 c2"]:
        """Applies the block; `skips` are in the order in which they were made."""
        # The last skip is used first: both ways meet at the lowest resolution.
        for i, resnet in enumerate(self.resnets):
            x = resnet(jnp.concatenate([x, skips[-1 - i]], axis=-1), time)
            if hasattr(self, "attentions"):
                x = self.attentions[i](x, context, mask)

        return self.upsamplers[0](x) if hasattr(self, "upsamplers") else x
