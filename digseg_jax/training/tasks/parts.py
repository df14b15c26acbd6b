# SPDX-License-Identifier: Apache-2.0
"""What tasks are made of: frozen VAE, prompt bank, codec, schedule, training draws of (t, noise)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digseg_jax import assets
from digseg_jax.arraytypes import Array, Float, Int, Params
from digseg_jax.config.schema import Config, DiffusionConfig, ModelConfig
from digseg_jax.data.vocabulary import bank_prompts
from digseg_jax.diffusion import noise, timesteps
from digseg_jax.diffusion.schedule import Schedule, make_schedule
from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.models.kernels.attention import PLATFORMS, unfit
from digseg_jax.models.partition import LocalAttention, gathered, in_slices, local_feed_forward
from digseg_jax.models.unet import UNetConfig
from digseg_jax.models.vae import VaeConfig
from digseg_jax.models.vae_tiny import TinyVaeConfig
from digseg_jax.segmentation.codec import Codec, HostAutoencoder
from digseg_jax.segmentation.codecs import make_codec
from digseg_jax.segmentation.prompt_bank import PromptBank, encode_prompts, with_sentence_token
from digseg_jax.weights import TextTower, load_component, load_config, load_text_tower

AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")
PORTABLE = "chunked"
ANCHORS = "anchors"  # key of the frozen tree; see `Codec.anchors`


def identity(x: Array) -> Array:
    return x


@dataclasses.dataclass(frozen=True)
class Vae:
    """The frozen autoencoder as functions of its parameters; latents here are *scaled*.

    limit: pictures that a device takes at a time; 0: all of a batch.
    """

    graphdef: nnx.GraphDef
    config: VaeConfig | TinyVaeConfig
    limit: int = 0

    def encode(self, params: Params, image: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        """Posterior mean times the scaling factor (Marigold: mean, never a sample)."""
        vae = functional.merge(self.graphdef, params)

        def encode(image: Array) -> Array:
            return vae.encode(image).mean * self.config.scaling_factor

        return in_slices(encode, image, self.limit)

    def decode(
        self, params: Params, latent: Float[Array, "b h w c"], read: Callable[[Array], Array] = identity
    ) -> Array:
        """Pictures float [b, H, W, 3], or what `read` makes of them.

        A few pictures of `limit` at a time are read before the next are made: many pictures with
        their three channels would fill a TPU's memory, whose tiles are 128 channels wide.
        """
        vae = functional.merge(self.graphdef, params)

        def decode(latent: Array) -> Array:
            return read(vae.decode(latent / self.config.scaling_factor))

        return in_slices(decode, latent, self.limit)

    def on_host(self, params: Params) -> HostAutoencoder:
        """The autoencoder with these parameters, compiled, for host arrays."""
        encode, decode = jax.jit(self.encode), jax.jit(self.decode)
        return HostAutoencoder(
            lambda image: np.asarray(encode(params, jnp.asarray(image))),
            lambda latent: np.asarray(decode(params, jnp.asarray(latent))),
            self.config.factor,
        )


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a segmentation task is made of, beside its configuration.

    unet: with the inputs that it gets here. prompts: the bank's texts. tower: encodes further queries;
    None where none will be asked. frozen: arrays, or their shapes: "vae", "bank" (tokens and mask of
    each prompt) and, where training needs them without the autoencoder, `ANCHORS`.
    """

    vae: Vae
    codec: Codec
    unet: UNetConfig
    prompts: tuple[str, ...]
    frozen: Params
    tower: TextTower | None = None


def load_parts(config: Config, prompts: Sequence[str] | None = None) -> Parts:
    """Loads the frozen parts and encodes the prompts, by default those of the training queries.

    Raises:
      UserError: weights are missing, or parts do not fit together or to the configuration.
    """
    model = config.model
    codec = make_codec(config)
    vae, vae_params = load_vae(model)
    tower = load_tower(model)

    prompts = codec.texts(bank_prompts(config.data) if prompts is None else prompts)
    frozen: Params = {"vae": vae_params, "bank": bank_arrays(encode_bank(tower, prompts, model))}
    anchors = kept_anchors(config, codec)
    if anchors is not None:
        frozen[ANCHORS] = vae.on_host(vae_params).encode(np.asarray(anchors))

    unet = widened(load_config(assets.resolve(model.unet)), vae, model, tower.width)
    check_fit(config, vae, tower, unet)
    return Parts(vae, codec, unet, prompts, frozen, tower)


def kept_anchors(config: Config, codec: Codec) -> Array | None:
    """The images whose latents are frozen parts; None: none.

    The auxiliary loss measures by them, and training from cached latents runs no autoencoder.
    """
    if not (config.data.latent_cache and config.diffusion.mask_loss_weight):
        return None
    return codec.anchors(config.data.image_size)


def widened(unet: UNetConfig, vae: Vae, model: ModelConfig, text_width: int) -> UNetConfig:
    """The U-Net of a checkpoint with the image's latent beside the mask's, and the text's width."""
    return dataclasses.replace(
        unet,
        in_channels=2 * vae.config.latent_channels,
        text_adapters=model.text_adapters,
        text_dim=text_width,
    )


def compute_options(config: ModelConfig) -> dict[str, Any]:
    """Constructor arguments of a model that say how it computes."""
    attention = PORTABLE if config.attention == "auto" else config.attention
    return {
        "dtype": jnp.dtype(config.dtype),
        "conv": "xla" if config.conv == "auto" else config.conv,
        "weights": gathered,
        "attention": LocalAttention(attention) if attention in PLATFORMS else attention,
    }


def unet_options(config: ModelConfig) -> dict[str, Any]:
    """`compute_options`, and those that the U-Net alone has."""
    fused = config.feed_forward == "fused"
    return compute_options(config) | {
        "remat": config.remat,
        "feed_forward": local_feed_forward if fused else None,
    }


def for_devices(config: Config, devices: Sequence[jax.Device]) -> Config:
    """The configuration with "auto" replaced by the way to compute that suits the devices.

    Raises:
      UserError: the devices cannot run `config.model.attention` or `config.model.feed_forward`.
    """
    platform, dtype = devices[0].platform, config.model.dtype
    name: str = config.model.attention
    if reason := unfit(name, devices[0], dtype):
        raise UserError(f"config.model.attention={name!r} {reason}; legal: auto, plain, chunked")
    feed_forward = config.model.feed_forward
    if feed_forward == "fused" and platform != "tpu":
        raise UserError(
            "config.model.feed_forward='fused' runs on TPUs only, the devices here are of platform "
            f"{platform!r}; legal: auto, plain"
        )
    if feed_forward == "auto":
        feed_forward = "fused" if platform == "tpu" and config.mesh.tensor == 1 else "plain"
    conv = config.model.conv
    if conv == "auto":
        conv = "cpu" if platform == "cpu" else "xla"
    if name == "auto":
        fits = (kernel for kernel in PLATFORMS if not unfit(kernel, devices[0], dtype))
        name = next(fits, PORTABLE)
    chosen: dict[str, Any] = {"conv": conv, "attention": name, "feed_forward": feed_forward}
    model = dataclasses.replace(config.model, **chosen)
    return dataclasses.replace(config, model=model)


def load_vae(config: ModelConfig) -> tuple[Vae, Params]:
    """Raises UserError if the weights are missing or no autoencoder."""
    model = load_component(assets.resolve(config.vae), expect=AUTOENCODERS, **compute_options(config))
    graphdef, params = functional.split(model)
    vae_config = model.config  # type: ignore[attr-defined]  # every model has one
    return Vae(graphdef, vae_config, config.vae_limit), params


def load_tower(config: ModelConfig) -> TextTower:
    """The frozen text tower; raises UserError if it is missing."""
    return load_text_tower(assets.resolve(config.text), skip_layers=config.text_skip_layers)


def encode_bank(tower: TextTower, prompts: Sequence[str], config: ModelConfig) -> PromptBank:
    """The prompts' tokens, with a sentence token behind them if the configuration wants one.

    Raises:
      UserError: an empty prompt or one of too many tokens, or too large a length.
    """
    length = config.max_tokens
    if length > tower.max_length:
        raise UserError(
            f"config.model.max_tokens={length}: at most {tower.max_length} for this text tower"
        )
    bank = encode_prompts(
        tower.graphdef,
        tower.params,
        tower.tokenizer,
        prompts,
        max_length=length,
        # a tower that is no CLIP's was trained with its padding masked, whatever the U-Net saw
        mask_padding=config.mask_padding or not tower.causal,
    )
    return with_sentence_token(bank) if config.sentence_token else bank


def bank_arrays(bank: PromptBank) -> Params:
    """The bank as a frozen tree for the jitted step."""
    return {"tokens": bank.tokens, "mask": bank.mask}


def asked(bank: Params, query: Int[Array, "*n"]) -> tuple[Array, Array]:
    """Tokens [*n, l, d] and mask [*n, l] of a bank's rows, in a traced program or outside."""
    return jnp.asarray(bank["tokens"])[query], jnp.asarray(bank["mask"])[query]


def schedule_of(config: DiffusionConfig) -> Schedule:
    return make_schedule(
        config.num_train_timesteps,
        config.beta_start,
        config.beta_end,
        zero_snr=config.zero_snr,
        prediction_type=config.prediction_type,
    )


def draw_noise_and_timestep(
    keys: Array, shape: tuple[int, ...], config: DiffusionConfig, schedule: Schedule
) -> tuple[Float[Array, "b h w c"], Array]:
    """One noise and one timestep per key: [b, *shape] and int32 [b]."""
    return jax.vmap(partial(_draw, shape=shape, config=config, schedule=schedule))(keys)


def _draw(
    key: Array, shape: tuple[int, ...], config: DiffusionConfig, schedule: Schedule
) -> tuple[Array, Array]:
    noise_key, time_key = jax.random.split(key)
    if config.timestep_sampling == "uniform":
        t = timesteps.uniform(time_key, schedule)
    else:
        t = timesteps.high_noise(
            time_key, schedule, a=config.high_noise_a, terminal_fraction=config.terminal_fraction
        )
    if config.noise == "multires":
        strength = config.multires_strength * t / schedule.num_timesteps
        return noise.multires(noise_key, shape, strength), t
    return noise.gaussian(noise_key, shape), t


def picture_step(vae: Vae, unet: UNetConfig) -> int:
    """Pixels that the sides of a picture must be multiples of."""
    return vae.config.factor * 2 ** (len(unet.block_out_channels) - 1)


def check_sizes(config: Config, vae: Vae, unet: UNetConfig) -> None:
    """Checks that training crops and an evaluation's views can be halved as often as the parts do.

    Raises:
      UserError: they cannot.
    """
    step = picture_step(vae, unet)
    sizes = {"data.image_size": (config.data.image_size,), "eval.view_size": config.eval.view_size}
    for key, sides in sizes.items():
        if any(side % step for side in sides):
            value = sides if key == "eval.view_size" else sides[0]
            raise UserError(
                f"config.{key}={value}: must be a multiple of {step} pixels for this VAE and U-Net"
            )


def check_fit(config: Config, vae: Vae, tower: TextTower, unet: UNetConfig) -> None:
    """Checks what the parts must agree on.

    Raises:
      UserError: a size that `check_sizes` refuses, or tokens of the wrong width.
    """
    check_sizes(config, vae, unet)
    if not unet.text_adapters and tower.width != unet.cross_attention_dim:
        raise UserError(
            f"config.model.text_adapters=False: text tokens are {tower.width} wide, the U-Net's "
            f"cross-attention takes {unet.cross_attention_dim}; set it to True"
        )


def provenance(config: Config, **extra: str) -> dict[str, str]:
    """What goes into the metadata of exported weights."""
    return {"task": config.task, "seed": str(config.seed), "steps": str(config.train.steps)} | extra
