# SPDX-License-Identifier: Apache-2.0
"""The conditional U-Net of Stable Diffusion 1.x and 2.x (diffusers: `unet_2d_condition.py`)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from digseg_jax.arraytypes import Array, Bool, DTypeLike, Float, Real
from digseg_jax.errors import UserError
from digseg_jax.models.hub_config import HubConfig, check_groups
from digseg_jax.models.kernels.attention import AttentionFn
from digseg_jax.models.kernels.feed_forward import FeedForwardFn
from digseg_jax.models.layers import (
    Compute,
    Conv,
    GroupNorm,
    Shared,
    WeightsFn,
    as_it_is,
    linear,
    timestep_embedding,
)
from digseg_jax.models.text_adapters import TextAdapter
from digseg_jax.models.unet_blocks import DownBlock, MidBlock, UpBlock

DOWN_TYPES = ("CrossAttnDownBlock2D", "DownBlock2D")
OWN_CLASS = "DigsegUNet2DConditionModel"  # class name of weights that diffusers' own class would misuse
NOTE = (
    "a U-Net of digseg_jax, not usable alone; open its pipeline: "
    "DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)"
)
UP_TYPES = ("CrossAttnUpBlock2D", "UpBlock2D")


@dataclasses.dataclass(frozen=True)
class UNetConfig(HubConfig):
    """Fields of the hub's `unet/config.json`; the defaults are Stable Diffusion 1.5's.

    Attributes:
      attention_head_dim: the *number* of heads, per level or for all (diffusers' historical naming).
      text_adapters: a `TextAdapter` per resolution before the cross-attention (not in diffusers).
      text_dim: width of the text tokens before the adapters; None: cross_attention_dim (not in
        diffusers).
      prompt_length: tokens of the prompt that every cross-attention keeps for itself while a second one
        beside it reads the text, see `models.attention.ParallelAttention`; 0: there is only one, which
        reads the text (not in diffusers).
      mark_width: features that follow those of the text in every token, such as the color that a text
        is painted in; a linear map of them is added to the text (not in diffusers).
    """

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_block_types: tuple[str, ...] = (DOWN_TYPES[0],) * 3 + (DOWN_TYPES[1],)
    up_block_types: tuple[str, ...] = (UP_TYPES[1],) + (UP_TYPES[0],) * 3
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    use_linear_projection: bool = False
    transformer_layers_per_block: int = 1
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    text_adapters: bool = False
    text_dim: int | None = None
    prompt_length: int = 0
    mark_width: int = 0

    CLASS_NAME: ClassVar[str] = "UNet2DConditionModel"
    REQUIRED_VALUES: ClassVar = {
        "act_fn": "silu",
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "mid_block_only_cross_attention": False,
        "center_input_sample": False,
        "only_cross_attention": False,
        "dual_cross_attention": False,
        "class_embed_type": None,
        "num_class_embeds": None,
        "addition_embed_type": None,
        "encoder_hid_dim": None,
        "time_embedding_type": "positional",
        "time_cond_proj_dim": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "resnet_time_scale_shift": "default",
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0,
        "attention_type": "default",
    }

    # Settings of the attention's precision, of training and of unused embeddings, and exporters' notes.
    HARMLESS: ClassVar = frozenset({
        "upcast_attention", "dropout", "addition_embed_type_num_heads",
        "addition_time_embed_dim", "projection_class_embeddings_input_dim",
        "class_embeddings_concat", "encoder_hid_dim_type", "digseg", "decay", "inv_gamma",
        "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup",
    })  # fmt: skip

    def __post_init__(self):
        levels = len(self.block_out_channels)

        # Block types: one for each level, of the kinds that exist here.
        kinds = {"down_block_types": DOWN_TYPES, "up_block_types": UP_TYPES}
        for field, legal in kinds.items():
            types = getattr(self, field)
            if len(types) != levels or set(types) - set(legal):
                raise UserError(
                    f"UNet2DConditionModel config: {field}={types!r}; legal: {levels} of {legal!r}"
                )

        # diffusers also allows one number for each level; no Stable Diffusion has that.
        for field in ("layers_per_block", "transformer_layers_per_block", "cross_attention_dim"):
            if not isinstance(getattr(self, field), int):
                raise UserError(
                    f"UNet2DConditionModel config: {field}={getattr(self, field)!r}; legal: one number"
                )

        check_groups("UNet2DConditionModel", self.block_out_channels, self.norm_num_groups)

        # One number of heads for all levels, or one for each.
        heads = self.num_attention_heads or self.attention_head_dim
        if isinstance(heads, tuple) and len(heads) != levels:
            raise UserError(
                f"UNet2DConditionModel config: attention_head_dim={heads!r}; legal: {levels} numbers"
            )
        attends = [t == DOWN_TYPES[0] for t in self.down_block_types]
        attends[-1] = True  # the middle has the last level's width
        for width, count, used in zip(self.block_out_channels, self.heads, attends, strict=True):
            if used and width % count:
                raise UserError(
                    f"UNet2DConditionModel config: attention_head_dim={heads!r}; legal: numbers of "
                    f"heads that divide block_out_channels={self.block_out_channels!r}"
                )

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that keeps diffusers' own class from misusing the weights.

        That class would silently drop adapters, a parallel attention to the text, or marks. With any of
        them, a key that it checks makes it raise, with NOTE in the message. Without them it computes
        the same from both latents, and warns about NOTE, a key that it does not know.
        """
        values = super().to_dict()
        if self.text_adapters or self.prompt_length or self.mark_width:
            return values | {"_class_name": OWN_CLASS, "encoder_hid_dim_type": NOTE}
        if self.in_channels != self.out_channels:
            return values | {"_class_name": OWN_CLASS, "digseg": NOTE}
        return values

    @property
    def heads(self) -> tuple[int, ...]:
        """Number of attention heads of each level."""
        heads = self.num_attention_heads or self.attention_head_dim
        return heads if isinstance(heads, tuple) else (heads,) * len(self.block_out_channels)

    @property
    def text_width(self) -> int:
        """Width of the text tokens that the network takes."""
        return self.text_dim or self.cross_attention_dim

    @property
    def text_features(self) -> int:
        """Width of the text tokens that the transformers read: the adapters', if there are any."""
        return self.cross_attention_dim if self.text_adapters else self.text_width


class TimestepEmbedding(nnx.Module):
    """Two linear layers with SiLU between them, from the timestep's sinusoids to its embedding."""

    def __init__(self, features: int, out_features: int, *, compute: Compute, rngs: nnx.Rngs):
        self.linear_1 = linear(features, out_features, compute=compute, rngs=rngs)
        self.linear_2 = linear(out_features, out_features, compute=compute, rngs=rngs)

    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b t"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class UNet2DConditionModel(nnx.Module):
    """The denoising network: predicts from noisy latent, timestep and text tokens.

    Args:
      config: architecture.
      dtype, conv, attention, remat, weights, feed_forward: how it is computed, see `layers.Compute`.
    """

    def __init__(
        self,
        config: UNetConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        conv: str = "xla",
        attention: str | AttentionFn = "plain",
        remat: str = "none",
        weights: WeightsFn = as_it_is,
        feed_forward: FeedForwardFn | None = None,
    ):
        # Options that all parts share; the timestep's embedding has four times the first level's width.
        compute = Compute(dtype, conv, attention, remat, weights, feed_forward)
        options: Shared = {"compute": compute, "rngs": rngs}
        widths, levels = config.block_out_channels, len(config.block_out_channels)
        time_features = 4 * widths[0]
        self.config, self.compute = config, compute

        # Inputs: latent, timestep, text; one text adapter per resolution.
        self.conv_in = Conv(config.in_channels, widths[0], **options)
        self.time_embedding = TimestepEmbedding(widths[0], time_features, **options)
        if config.mark_width:
            self.mark_embedding = linear(config.mark_width, config.text_width, **options)
        if config.text_adapters:
            self.text_adapters = nnx.List(
                [TextAdapter(config.text_width, config.text_features, **options) for _ in widths]
            )

        # Down, at the highest resolution first; the last level is not downsampled.
        self.down_blocks = nnx.List(
            [
                DownBlock(
                    widths[max(i - 1, 0)],
                    widths[i],
                    heads=config.heads[i] if kind == DOWN_TYPES[0] else None,
                    downsample=i < levels - 1,
                    config=config,
                    layers=config.layers_per_block,
                    time_features=time_features,
                    **options,
                )
                for i, kind in enumerate(config.down_block_types)
            ]
        )

        # At the lowest resolution.
        self.mid_block = MidBlock(
            widths[-1],
            heads=config.heads[-1],
            config=config,
            time_features=time_features,
            **options,
        )

        # Up, at the lowest resolution first; each level also takes the skips of its down block.
        self.up_blocks = nnx.List(
            [
                UpBlock(
                    widths[max(level - 1, 0)],
                    widths[min(level + 1, levels - 1)],
                    widths[level],
                    heads=config.heads[level] if kind == UP_TYPES[0] else None,
                    upsample=level > 0,
                    config=config,
                    layers=config.layers_per_block,
                    time_features=time_features,
                    **options,
                )
                for level, kind in zip(reversed(range(levels)), config.up_block_types, strict=True)
            ]
        )

        # The highest resolution again, to the channels of the prediction.
        self.conv_norm_out = GroupNorm(
            widths[0], config.norm_num_groups, eps=config.norm_eps, compute=compute
        )
        self.conv_out = Conv(widths[0], config.out_channels, **options)

    def __call__(
        self,
        sample: Float[Array, "b h w c"],
        timestep: Real[Array, "b"],
        context: Float[Array, "b l d"],
        context_mask: Bool[Array, "b l"] | None = None,
    ) -> Float[Array, "b h w c_out"]:
        """Predicts noise, v or x0, in float32.

        Args:
          sample: latents; height and width are multiples of 2 ** (levels - 1).
          timestep: one per example, 0 to T - 1.
          context: text tokens, with the features of their marks behind them if there are any.
          context_mask: True (or non-zero) where a text token is real; None: all are.
        """
        mask = None if context_mask is None else context_mask.astype(bool)
        contexts = self._contexts(context.astype(self.compute.dtype))
        time = self._time(timestep)

        # Down, collecting the skip connections.
        x = self.conv_in(sample)
        skips = [x]
        for down, text in zip(self.down_blocks, contexts, strict=True):
            x, outputs = down(x, time, text, mask)
            skips += outputs

        x = self.mid_block(x, time, contexts[-1], mask)

        # Up, taking the last skips first, one for each resnet.
        for up, text in zip(self.up_blocks, reversed(contexts), strict=True):
            count = len(up.resnets)
            x = up(x, skips[-count:], time, text, mask)
            skips = skips[:-count]

        return self.conv_out(self.conv_norm_out(x, silu=True)).astype(jnp.float32)

    def _time(self, timestep: Array) -> Array:
        """Embedding of the timestep, [b, 4 * width], in the type of the activations."""
        c = self.config
        sinusoids = timestep_embedding(
            timestep,
            c.block_out_channels[0],
            flip_sin_to_cos=c.flip_sin_to_cos,
            freq_shift=c.freq_shift,
        )
        return self.time_embedding(sinusoids.astype(self.compute.dtype))

    def _contexts(self, context: Array) -> list[Array]:
        """The text tokens for each level, the highest resolution first."""
        if self.config.mark_width:
            width = self.config.text_width
            context = context[..., :width] + self.mark_embedding(context[..., width:])
        if self.config.text_adapters:
            return [adapter(context) for adapter in self.text_adapters]
        return [context] * len(self.down_blocks)
