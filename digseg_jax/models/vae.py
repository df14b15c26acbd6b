# SPDX-License-Identifier: Apache-2.0
"""The KL autoencoder of Stable Diffusion (diffusers: `autoencoders/autoencoder_kl.py`, `vae.py`)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple, Unpack

import jax.numpy as jnp
from flax import nnx

from digseg_jax.arraytypes import Array, DTypeLike, Float
from digseg_jax.errors import UserError
from digseg_jax.models.attention import Attention
from digseg_jax.models.hub_config import HubConfig, check_groups
from digseg_jax.models.kernels.attention import AttentionFn
from digseg_jax.models.layers import Compute, Conv, GroupNorm, Shared, WeightsFn, as_it_is
from digseg_jax.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D

EPS = 1e-6  # every norm of the VAE; the U-Net's resnets use 1e-5


@dataclasses.dataclass(frozen=True)
class VaeConfig(HubConfig):
    """Fields of the hub's `vae/config.json`; the defaults are Stable Diffusion's."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    sample_size: int = 512
    mid_block_add_attention: bool = True
    down_block_types: tuple[str, ...] | None = None
    up_block_types: tuple[str, ...] | None = None

    CLASS_NAME: ClassVar[str] = "AutoencoderKL"
    REQUIRED_VALUES: ClassVar = {
        "act_fn": "silu",
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    }
    HARMLESS: ClassVar = frozenset({"force_upcast", "use_slicing", "use_tiling"})

    def __post_init__(self):
        # diffusers needs the types of the blocks, of which there is one kind each. The dataclass is
        # frozen, hence `object.__setattr__`.
        kinds = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
        for field, kind in kinds.items():
            legal, given = (kind,) * len(self.block_out_channels), getattr(self, field)
            if given not in (None, legal):
                raise UserError(f"AutoencoderKL config: {field}={given!r}; legal: {legal!r}")
            object.__setattr__(self, field, legal)
        check_groups("AutoencoderKL", self.block_out_channels, self.norm_num_groups)

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


class Posterior(NamedTuple):
    """A diagonal Gaussian over unscaled latents."""

    mean: Float[Array, "b h w c"]
    logvar: Float[Array, "b h w c"]


class _Block(nnx.Module):
    """Resnets at one resolution, then a resampling: "down", "up" or "none"."""

    def __init__(
        self, cin: int, cout: int, layers: int, groups: int, resample: str, **options: Unpack[Shared]
    ):
        self.resnets = nnx.List(
            [
                ResnetBlock2D(cin if i == 0 else cout, cout, groups=groups, eps=EPS, **options)
                for i in range(layers)
            ]
        )

        # Attribute names decide the checkpoint's keys: a block has at most one of the two.
        if resample == "down":
            self.downsamplers = nnx.List([Downsample2D(cout, asymmetric=True, **options)])
        elif resample == "up":
            self.upsamplers = nnx.List([Upsample2D(cout, **options)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
        for resnet in self.resnets:
            x = resnet(x)

        for resampler in [*getattr(self, "downsamplers", []), *getattr(self, "upsamplers", [])]:
            x = resampler(x)
        return x


class _Mid(nnx.Module):
    """Resnet, optional self-attention over positions, resnet."""

    def __init__(self, c: int, groups: int, attention: bool, **options: Unpack[Shared]):
        self.resnets = nnx.List(
            [ResnetBlock2D(c, c, groups=groups, eps=EPS, **options) for _ in range(2)]
        )

        # Stable Diffusion's autoencoder has attention here, the shipped small one does not.
        if attention:
            self.attentions = nnx.List(
                [Attention(c, c, 1, bias=True, norm_groups=groups, norm_eps=EPS, **options)]
            )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        x = self.resnets[0](x)

        # One head over all positions of the map.
        if hasattr(self, "attentions"):
            b, h, w, c = x.shape
            x = x + self.attentions[0](x.reshape(b, h * w, c)).reshape(x.shape)
        return self.resnets[1](x)


class Encoder(nnx.Module):
    """Encodes images to mean and log-variance of the latent, side by side in the channels."""

    def __init__(self, config: VaeConfig, **options: Unpack[Shared]):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv(config.in_channels, widths[0], **options)

        # One block for each level; all but the last halve the resolution.
        self.down_blocks = nnx.List(
            [
                _Block(
                    widths[max(i - 1, 0)],
                    width,
                    config.layers_per_block,
                    groups,
                    "down" if i < len(widths) - 1 else "none",
                    **options,
                )
                for i, width in enumerate(widths)
            ]
        )

        # Mean and log-variance come out together, hence twice the channels.
        self.mid_block = _Mid(widths[-1], groups, config.mid_block_add_attention, **options)
        self.conv_norm_out = GroupNorm(widths[-1], groups, eps=EPS, compute=options["compute"])
        self.conv_out = Conv(widths[-1], 2 * config.latent_channels, **options)

    def __call__(self, x: Float[Array, "b H W c"]) -> Float[Array, "b h w d"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


class Decoder(nnx.Module):
    """Decodes latents to images; the levels of the encoder in reverse."""

    def __init__(self, config: VaeConfig, **options: Unpack[Shared]):
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv(config.latent_channels, widths[0], **options)
        self.mid_block = _Mid(widths[0], groups, config.mid_block_add_attention, **options)

        # One block for each level, with a resnet more than in the encoder; all but the last double.
        self.up_blocks = nnx.List(
            [
                _Block(
                    widths[max(i - 1, 0)],
                    width,
                    config.layers_per_block + 1,
                    groups,
                    "up" if i < len(widths) - 1 else "none",
                    **options,
                )
                for i, width in enumerate(widths)
            ]
        )

        self.conv_norm_out = GroupNorm(widths[-1], groups, eps=EPS, compute=options["compute"])
        self.conv_out = Conv(widths[-1], config.out_channels, **options)

    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b H W d"]:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x, silu=True))


class AutoencoderKL(nnx.Module):
    """Stable Diffusion's autoencoder: images [b, H, W, 3] in [-1, 1], latents [b, H/f, W/f, 4].

    f is `config.factor`. Latents are unscaled: the U-Net's are `config.scaling_factor` times as large.
    """

    def __init__(
        self,
        config: VaeConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        conv: str = "xla",
        attention: str | AttentionFn = "plain",
        remat: str = "none",
        weights: WeightsFn = as_it_is,
    ):
        options: Shared = {"compute": Compute(dtype, conv, attention, remat, weights), "rngs": rngs}
        channels = config.latent_channels
        self.config = config
        self.encoder = Encoder(config, **options)
        self.decoder = Decoder(config, **options)

        # 1x1 convolutions on the latent, left over from the VQ autoencoder that this one descends from.
        self.quant_conv = Conv(2 * channels, 2 * channels, 1, **options)
        self.post_quant_conv = Conv(channels, channels, 1, **options)

    def encode(self, image: Float[Array, "b H W c"]) -> Posterior:
        """Encodes to the unscaled posterior; the U-Net takes its mean times `config.scaling_factor`."""
        moments = self.quant_conv(self.encoder(image)).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)

        # diffusers' bounds (`DiagonalGaussianDistribution`): exp must not overflow.
        return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))

    def decode(self, latent: Float[Array, "b h w c"]) -> Float[Array, "b H W d"]:
        """Decodes unscaled latents to images, nominally in [-1, 1] and not clipped, float32."""
        return self.decoder(self.post_quant_conv(latent)).astype(jnp.float32)

    def __call__(self, image: Float[Array, "b H W c"]) -> Float[Array, "b H W c"]:
        """Encodes and decodes through the posterior mean."""
        return self.decode(self.encode(image).mean)
