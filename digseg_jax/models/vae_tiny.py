# SPDX-License-Identifier: Apache-2.0
"""The distilled autoencoder TAESD (diffusers: `autoencoders/autoencoder_tiny.py`, `vae.py`).

It has about 1/30 of the parameters of Stable Diffusion's autoencoder and is far cheaper to run. It has
no posterior, and its latents are scaled as Stable Diffusion's U-Net takes them: scaling factor 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple, Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from digseg_jax.arraytypes import Array, DTypeLike, Float
from digseg_jax.errors import UserError
from digseg_jax.models.hub_config import HubConfig
from digseg_jax.models.kernels.attention import AttentionFn
from digseg_jax.models.layers import Compute, Conv, Shared, WeightsFn, as_it_is


@dataclasses.dataclass(frozen=True)
class TinyVaeConfig(HubConfig):
    """Fields of the hub's `config.json`; the defaults are TAESD's.

    Attributes:
      latent_magnitude, latent_shift: how latents are stored as bytes; the model does not use them.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float = 3
    latent_shift: float = 0.5
    scaling_factor: float = 1.0

    CLASS_NAME: ClassVar[str] = "AutoencoderTiny"
    REQUIRED_VALUES: ClassVar = {
        "act_fn": "relu",
        "upsample_fn": "nearest",
        "upsampling_scaling_factor": 2,
        "shift_factor": 0.0,
    }
    # The first repeats the encoder's channels.
    HARMLESS: ClassVar = frozenset({"block_out_channels", "force_upcast"})

    def __post_init__(self):
        sides = {
            "encoder": (self.encoder_block_out_channels, self.num_encoder_blocks),
            "decoder": (self.decoder_block_out_channels, self.num_decoder_blocks),
        }

        # diffusers' layout has no layer between levels that could change the width.
        for side, (widths, counts) in sides.items():
            if len(widths) != len(counts) or len(set(widths)) != 1:
                raise UserError(
                    f"AutoencoderTiny config: {side}_block_out_channels={widths!r}; legal: "
                    f"{len(counts)} equal widths"
                )

        # Both sides must have the same number of levels: one halves, the other doubles.
        if len(self.num_encoder_blocks) != len(self.num_decoder_blocks):
            raise UserError(
                f"AutoencoderTiny config: num_decoder_blocks={self.num_decoder_blocks!r}; legal: "
                f"{len(self.num_encoder_blocks)} numbers, as many as num_encoder_blocks"
            )

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along one side."""
        return 2 ** (len(self.num_encoder_blocks) - 1)


class PointLatent(NamedTuple):
    """Result of an encoder without posterior; its field is named as in `vae.Posterior`."""

    mean: Float[Array, "b h w c"]


class ReLU(nnx.Module):
    """The activation as a layer, because it counts in torch's indices of a sequence."""

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return jax.nn.relu(x)


class Upsample(nnx.Module):
    """Identity that counts in torch's indices; the convolution after it upsamples."""

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return x


class TinyBlock(nnx.Module):
    """Residual block: three convolutions with ReLU between them, the input added, ReLU."""

    def __init__(self, c: int, **options: Unpack[Shared]):
        convs = [Conv(c, c, **options) for _ in range(3)]
        self.conv = nnx.List([convs[0], ReLU(), convs[1], ReLU(), convs[2]])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return jax.nn.relu(_sequence(self.conv, x) + x)


class TinyEncoder(nnx.Module):
    """Image in [-1, 1] to latent."""

    def __init__(self, config: TinyVaeConfig, **options: Unpack[Shared]):
        width = config.encoder_block_out_channels[0]

        # The first level keeps the resolution, each further one halves it.
        layers: list[nnx.Module] = []
        for i, count in enumerate(config.num_encoder_blocks):
            if i == 0:
                layers.append(Conv(config.in_channels, width, **options))
            else:
                layers.append(Conv(width, width, stride=2, use_bias=False, **options))
            layers += [TinyBlock(width, **options) for _ in range(count)]

        layers.append(Conv(width, config.latent_channels, **options))
        self.layers = nnx.List(layers)

    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w d"]:
        return _sequence(self.layers, (x + 1.0) / 2.0)  # TAESD's images lie in [0, 1]


class TinyDecoder(nnx.Module):
    """Latent to image, nominally in [-1, 1]."""

    def __init__(self, config: TinyVaeConfig, **options: Unpack[Shared]):
        width = config.decoder_block_out_channels[0]

        # Each level but the last ends by doubling the resolution.
        layers: list[nnx.Module] = [Conv(config.latent_channels, width, **options), ReLU()]
        for count in config.num_decoder_blocks[:-1]:
            layers += [TinyBlock(width, **options) for _ in range(count)]
            layers += [Upsample(), Conv(width, width, use_bias=False, doubled=True, **options)]

        layers += [TinyBlock(width, **options) for _ in range(config.num_decoder_blocks[-1])]
        layers.append(Conv(width, config.out_channels, **options))
        self.layers = nnx.List(layers)

    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b H W d"]:
        z = jnp.tanh(z / 3.0) * 3.0  # a soft clamp, part of the model
        return _sequence(self.layers, z) * 2.0 - 1.0


class AutoencoderTiny(nnx.Module):
    """TAESD: images [b, H, W, 3] in [-1, 1] to latents [b, H/f, W/f, 4] and back.

    f is `config.factor`.
    """

    def __init__(
        self,
        config: TinyVaeConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        conv: str = "xla",
        attention: str | AttentionFn = "plain",
        remat: str = "none",
        weights: WeightsFn = as_it_is,
    ):
        del (
            attention,
            remat,
        )  # every model takes them; here there is nothing to choose
        options: Shared = {"compute": Compute(dtype, conv, weights=weights), "rngs": rngs}
        self.config = config
        self.encoder = TinyEncoder(config, **options)
        self.decoder = TinyDecoder(config, **options)

    def encode(self, image: Float[Array, "b H W c"]) -> PointLatent:
        """Encodes images to latents; the U-Net takes them times `config.scaling_factor` (TAESD: 1)."""
        return PointLatent(self.encoder(image).astype(jnp.float32))

    def decode(self, latent: Float[Array, "b h w c"]) -> Float[Array, "b H W d"]:
        """Decodes latents to images, nominally in [-1, 1] and not clipped, float32."""
        return self.decoder(latent).astype(jnp.float32)

    def __call__(self, image: Float[Array, "b H W c"]) -> Float[Array, "b H W c"]:
        """Encodes and decodes; unlike diffusers', without rounding the latent to bytes."""
        return self.decode(self.encode(image).mean)


def _sequence(layers: Iterable[Any], x: Array) -> Array:
    """Applies layers one after another."""
    for layer in layers:
        x = layer(x)
    return x
