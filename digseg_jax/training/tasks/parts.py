# SPDX-License-Identifier: Apache-2.0
"""The parts that tasks are made of: frozen VAE, prompt bank, codec, schedule, draws of (t, noise)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digseg_jax import assets
from digseg_jax.arraytypes import Array, Float, Int, Params
from digseg_jax.config.sampling import NUM_TRAIN_TIMESTEPS
from digseg_jax.config.schema import (
    ComputeConfig,
    DataConfig,
    DiffusionConfig,
    LossConfig,
    ModelConfig,
)
from digseg_jax.data.vocabulary import bank_prompts
from digseg_jax.diffusion import ddim, noise, timesteps
from digseg_jax.diffusion.schedule import BETA_END, BETA_START, Schedule, make_schedule
from digseg_jax.errors import UserError
from digseg_jax.log import log
from digseg_jax.models import functional
from digseg_jax.models.kernels.attention import PLATFORMS, unfit
from digseg_jax.models.partition import LocalAttention, gathered, in_slices, local_feed_forward
from digseg_jax.models.text_branch import lacking
from digseg_jax.models.unet import UNetConfig
from digseg_jax.models.vae import VaeConfig
from digseg_jax.models.vae_tiny import TinyVaeConfig
from digseg_jax.segmentation.codec import Codec, HostAutoencoder
from digseg_jax.segmentation.codecs import CODECS, make_codec
from digseg_jax.segmentation.prompt_bank import (
    PromptBank,
    encode_prompts,
    only_sentence_token,
    with_sentence_token,
)
from digseg_jax.training.tasks.unet_start import PromptShape, empty_shape, prompt_length
from digseg_jax.weights import TextTower, load_component, load_config, load_text_tower

AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")  # legal classes of config.model.vae
PORTABLE = "chunked"  # attention that every device runs
TAIL_SCALE = 0.1  # GenMask's a: the scale of the heavy tail of `timesteps.high_noise`
MULTIRES_STRENGTH = 0.9  # Marigold's: the strength at the last timestep, annealed to 0 at the first
ANCHORS = "anchors"  # key of the frozen tree; see `Codec.anchors`


def identity(x: Array) -> Array:
    """Returns its argument."""
    return x


@dataclasses.dataclass(frozen=True)
class Vae:
    """The frozen autoencoder as functions of its parameters; latents here are *scaled*.

    limit: images that a device takes at a time; 0: all of a batch. dtype: of activations.
    """

    graphdef: nnx.GraphDef
    config: VaeConfig | TinyVaeConfig
    limit: int = 0
    dtype: str = "float32"

    def encode(self, params: Params, image: Float[Array, "b H W 3"]) -> Float[Array, "b h w c"]:
        """Posterior mean times the scaling factor (Marigold: mean, never a sample)."""
        vae = functional.merge(self.graphdef, params)

        def encode(image: Array) -> Array:
            return vae.encode(image).mean * self.config.scaling_factor

        return in_slices(encode, image, self.limit)

    def decode(
        self, params: Params, latent: Float[Array, "b h w c"], read: Callable[[Array], Array] = identity
    ) -> Array:
        """Decodes latents to images, float [b, H, W, 3] in [-1, 1], or to what `read` makes of them.

        `read` gets at most `limit` images, before the next ones are decoded: all images of a batch at
        once would fill a TPU's memory, which stores three channels in tiles of 128.
        """
        vae = functional.merge(self.graphdef, params)

        def decode(latent: Array) -> Array:
            return read(vae.decode(latent / self.config.scaling_factor))

        return in_slices(decode, latent, self.limit)

    def on_host(self, params: Params) -> HostAutoencoder:
        """The autoencoder with these parameters, compiled, for host arrays.

        Constants come from it: products use all bits of their factors, which GPUs and TPUs would round.
        """
        # Those of 16-bit numbers do so anyway, and kernels for TPUs refuse the wish.
        precision = "highest" if self.dtype == "float32" else None

        def exactly(compiled: Callable[..., Array], x: np.ndarray) -> np.ndarray:
            with jax.default_matmul_precision(precision):
                return np.asarray(compiled(params, jnp.asarray(x)))

        encode, decode = (partial(exactly, jax.jit(f)) for f in (self.encode, self.decode))
        return HostAutoencoder(encode, decode, self.config.factor)


@dataclasses.dataclass(frozen=True)
class Parts:
    """Everything that a segmentation task needs beside its configuration.

    vae: the autoencoder's functions; its parameters are in `frozen`.
    codec: between masks and images.
    unet: architecture, with the inputs that it gets here.
    prompts: texts of the bank.
    frozen: arrays, or their shapes: "vae", "bank" (tokens and mask of each prompt) and, where training
      needs them without the autoencoder, `ANCHORS`.
    tower: encodes further queries; None where none will be asked.
    new: regexes on paths of the U-Net's parameters that no checkpoint gives.
    """

    vae: Vae
    codec: Codec
    unet: UNetConfig
    prompts: tuple[str, ...]
    frozen: Params
    tower: TextTower | None = None
    new: tuple[str, ...] = ()


def load_parts(
    data: DataConfig,
    model: ModelConfig,
    compute: ComputeConfig,
    loss: LossConfig,
    prompts: Sequence[str] | None = None,
    classes: int | None = None,
) -> Parts:
    """Loads the frozen parts and encodes the prompts, by default those of the training queries.

    prompts: () leaves out the bank, for whoever encodes queries as they come.
    classes: their number where the data set may not be at hand; None: as many as it has.

    Raises:
      UserError: weights are missing, or parts do not fit together or to the configuration.
    """
    codec = make_codec(model.codec, data, classes)
    vae, vae_params = load_vae(model, compute)
    tower = load_tower(model)

    # Frozen arrays: the autoencoder, the encoded prompts, and what a cache of latents cannot give.
    frozen: Params = {"vae": vae_params}
    prompts = bank_prompts(data) if prompts is None else prompts
    texts = codec.texts(prompts) if prompts else ()
    if texts:
        frozen["bank"] = bank_arrays(encode_bank(tower, texts, model, pooled=codec.pooled))
    anchors = anchors_for_cache(codec, data, loss)
    if anchors is not None:
        frozen[ANCHORS] = vae.on_host(vae_params).encode(np.asarray(anchors))

    # The U-Net's architecture is enough here: its weights are the task's to load.
    stored = load_config(assets.resolve(model.unet), expect="UNet2DConditionModel")
    unet = adapt_unet(stored, vae, model, tower.width)
    check_tokens(tower, unet)
    return Parts(vae, codec, unet, texts, frozen, tower, new_parameters(model, stored, unet))


def anchors_for_cache(codec: Codec, data: DataConfig, loss: LossConfig) -> Array | None:
    """The codec's anchor images, if their latents must be frozen parts; None otherwise.

    The auxiliary mask loss compares with these latents, and training from cached latents has no
    autoencoder in its step to make them.
    """
    if not (data.latent_cache and loss.mask_weight):
        return None
    return codec.anchors(data.image_size)


def adapt_unet(
    unet: UNetConfig,
    vae: Vae,
    model: ModelConfig,
    text_width: int,
    empty: Callable[[ModelConfig], PromptShape] = empty_shape,
) -> UNetConfig:
    """A checkpoint's U-Net configuration with both latents as input, and this text tower's pathway.

    empty: see `unet_start.prompt_length`, whose errors it raises.

    Raises:
      UserError: the U-Net predicts latents of another autoencoder.
    """
    if unet.out_channels != vae.config.latent_channels:
        raise UserError(
            f"config.model.unet={model.unet!r} predicts latents of {unet.out_channels} channels, those "
            f"of config.model.vae={model.vae!r} have {vae.config.latent_channels}; name fitting ones"
        )
    return dataclasses.replace(
        unet,
        in_channels=2 * vae.config.latent_channels,
        text_adapters=model.text_adapters,
        text_dim=text_width,
        prompt_length=prompt_length(model, unet, empty),
        mark_width=CODECS[model.codec].mark_width(vae.config.latent_channels),
    )


def new_parameters(model: ModelConfig, stored: UNetConfig, unet: UNetConfig) -> tuple[str, ...]:
    """`Parts.new` of a U-Net that starts from a checkpoint; from random weights none is newer."""
    return lacking(stored, unet) if model.unet_init == "pretrained" else ()


def compute_options(model: ModelConfig, compute: ComputeConfig) -> dict[str, Any]:
    """Constructor arguments of a model: precision and kernels."""
    return {
        "dtype": jnp.dtype(model.dtype),
        "conv": "xla" if compute.conv == "auto" else compute.conv,
        "weights": gathered,
        "attention": attention_of(compute),
    }


def attention_of(compute: ComputeConfig) -> str | LocalAttention:
    """The attention of a model; a kernel of one platform is run on each device's own examples."""
    name = PORTABLE if compute.attention == "auto" else compute.attention
    return LocalAttention(name) if name in PLATFORMS else name


def unet_options(model: ModelConfig, compute: ComputeConfig) -> dict[str, Any]:
    """Constructor arguments of the U-Net: `compute_options`, and those that it alone has."""
    fused = compute.feed_forward == "fused"
    return compute_options(model, compute) | {
        "remat": compute.remat,
        "feed_forward": local_feed_forward if fused else None,
    }


def choose_kernels(
    compute: ComputeConfig, devices: Sequence[jax.Device], dtype: str, tensor: int
) -> ComputeConfig:
    """Replaces each "auto" by the kernel that suits the devices.

    dtype: of activations. tensor: devices that share a weight matrix.

    Raises:
      UserError: the devices cannot run `config.compute.attention` or `config.compute.feed_forward`.
    """
    platform = devices[0].platform

    # A kernel that was asked for by name must run here.
    name: str = compute.attention
    if reason := unfit(name, devices[0], dtype):
        raise UserError(f"config.compute.attention={name!r} {reason}; legal: auto, plain, chunked")
    feed_forward = compute.feed_forward
    if feed_forward == "fused" and platform != "tpu":
        raise UserError(
            "config.compute.feed_forward='fused' runs on TPUs only, the devices here are of platform "
            f"{platform!r}; legal: auto, plain"
        )

    # "auto": the fused feed-forward holds its weights whole, so not where `tensor` splits them; of
    # attention kernels the first that fits.
    if feed_forward == "auto":
        feed_forward = "fused" if platform == "tpu" and tensor == 1 else "plain"
    conv = compute.conv
    if conv == "auto":
        conv = "cpu" if platform == "cpu" else "xla"
    if name == "auto":
        fits = (kernel for kernel in PLATFORMS if not unfit(kernel, devices[0], dtype))
        name = next(fits, PORTABLE)

    chosen: dict[str, Any] = {"conv": conv, "attention": name, "feed_forward": feed_forward}
    return dataclasses.replace(compute, **chosen)


def load_vae(config: ModelConfig, compute: ComputeConfig) -> tuple[Vae, Params]:
    """Loads the frozen autoencoder; raises UserError if it is missing or another kind of model."""
    options = compute_options(config, compute)
    model = load_component(assets.resolve(config.vae), expect=AUTOENCODERS, **options)
    graphdef, params = functional.split(model)
    vae_config = model.config  # type: ignore[attr-defined]  # every model has one
    return Vae(graphdef, vae_config, compute.vae_batch, config.dtype), params


def load_tower(config: ModelConfig) -> TextTower:
    """Loads the frozen text tower; raises UserError if it is missing."""
    return load_text_tower(assets.resolve(config.text), skip_layers=config.text_skip_layers)


@functools.cache
def _tell_unknown(words: tuple[str, ...]) -> None:
    """Logs, once, the words that the text encoder cannot tell apart."""
    shown = ", ".join(map(repr, words[:8])) + (", ..." if len(words) > 8 else "")
    log.warning(
        "the text encoder has no token for %s: to it they all are one unknown word, so prompts that "
        "differ in them alone get equal masks; describe them in other words",
        shown,
    )


def encode_bank(
    tower: TextTower,
    prompts: Sequence[str],
    config: ModelConfig,
    batch_size: int = 64,
    *,
    pooled: bool = False,
) -> PromptBank:
    """Encodes prompts to tokens, with a sentence token behind them if the configuration has one.

    batch_size: prompts per call of the tower; with 1, a prompt's tokens do not depend on the others'.
    pooled: one token for each prompt, its sentence feature: of a causal encoder (CLIP's) the token that
      ends the text, of others the mean of the tokens.

    Raises:
      UserError: an empty prompt or one of too many tokens, or too large a length.
    """
    length = config.max_tokens
    if length > tower.max_length:
        raise UserError(
            f"config.model.max_tokens={length}: at most {tower.max_length} for this text tower"
        )

    # Words without a token are worth a warning.
    if words := tower.tokenizer.unknown(prompts):
        _tell_unknown(tuple(words))

    bank = encode_prompts(
        tower.graphdef,
        tower.params,
        tower.tokenizer,
        prompts,
        max_length=length,
        batch_size=batch_size,
        # Text towers other than CLIP were trained with their padding masked, whatever the U-Net saw.
        mask_padding=config.mask_padding or not tower.causal,
        pooled=pooled and tower.causal,
    )

    # What follows the tokens, or takes their place.
    if pooled:
        return bank if tower.causal else only_sentence_token(bank)
    return with_sentence_token(bank) if config.sentence_token else bank


def bank_shape(prompts: int, model: ModelConfig, width: int) -> tuple[int, int, int]:
    """Shape [prompts, tokens, width] of the tokens of `encode_bank`.

    width: of the text tower's tokens.
    """
    pooled = CODECS[model.codec].pooled
    return prompts, 1 if pooled else model.max_tokens + int(model.sentence_token), width


def bank_arrays(bank: PromptBank) -> Params:
    """The bank as a frozen tree for the jitted step."""
    return {"tokens": bank.tokens, "mask": bank.mask}


def bank_rows(bank: Params, query: Int[Array, "*n"]) -> tuple[Array, Array]:
    """Tokens [*n, l, d] and mask [*n, l] of the bank's rows of queries, traced or not."""
    return jnp.asarray(bank["tokens"])[query], jnp.asarray(bank["mask"])[query]


def schedule_from(config: DiffusionConfig) -> Schedule:
    """Makes the noise schedule of a configuration."""
    return make_schedule(
        NUM_TRAIN_TIMESTEPS,
        BETA_START,
        BETA_END,
        zero_snr=config.zero_snr,
        prediction_type=config.prediction_type,
    )


def draw_noise_and_timestep(
    keys: Array, shape: tuple[int, ...], config: DiffusionConfig, schedule: Schedule
) -> tuple[Float[Array, "b h w c"], Array]:
    """Draws one noise and one timestep per key: float [b, *shape] and int32 [b]."""
    return jax.vmap(partial(_draw, shape=shape, config=config, schedule=schedule))(keys)


def _draw(
    key: Array, shape: tuple[int, ...], config: DiffusionConfig, schedule: Schedule
) -> tuple[Array, Array]:
    """`draw_noise_and_timestep` of one key."""
    noise_key, time_key = jax.random.split(key)

    if config.timestep_sampling == "uniform":
        t = timesteps.uniform(time_key, schedule)
    else:
        t = timesteps.high_noise(
            time_key, schedule, a=TAIL_SCALE, terminal_fraction=config.terminal_fraction
        )

    # The sampler's own timesteps; a share of 0 changes no draw. Their key is none of its own: it equals
    # the second of `split(time_key)`, from which `high_noise` draws its tail; here it is split again.
    if config.sampler_share:
        points = ddim.timesteps(schedule.num_timesteps, config.sampler_steps, "trailing")
        mixed_key = jax.random.fold_in(time_key, 1)
        t = timesteps.sampled(mixed_key, t, points, config.sampler_share)

    # Marigold's: the noisier the timestep, the coarser the noise may be.
    if config.noise == "multires":
        strength = MULTIRES_STRENGTH * t / schedule.num_timesteps
        return noise.multires(noise_key, shape, strength), t
    return noise.gaussian(noise_key, shape), t


def size_step(vae: Vae, unet: UNetConfig) -> int:
    """Pixels that an image's sides must be multiples of, for the VAE and every level of the U-Net."""
    return vae.config.factor * 2 ** (len(unet.block_out_channels) - 1)


def check_size(key: str, size: int | tuple[int, ...], vae: Vae, unet: UNetConfig) -> None:
    """Checks that a setting's side, or sides, in pixels can be halved as often as the parts do.

    Raises:
      UserError: they cannot.
    """
    step = size_step(vae, unet)
    if any(side % step for side in np.atleast_1d(size)):
        raise UserError(
            f"config.{key}={size}: must be a multiple of {step} pixels for this VAE and U-Net"
        )


def check_tokens(tower: TextTower, unet: UNetConfig) -> None:
    """Raises UserError for text tokens of a width that the U-Net's cross-attention does not take."""
    fits = unet.text_adapters or unet.prompt_length or tower.width == unet.cross_attention_dim
    if not fits:
        raise UserError(
            f"config.model.text_adapters=False: text tokens are {tower.width} wide, the U-Net's "
            f"cross-attention takes {unet.cross_attention_dim}; set it to True"
        )


def provenance(task: str, seed: int, steps: int) -> dict[str, str]:
    """Metadata of exported weights."""
    return {"task": task, "seed": str(seed), "steps": str(steps)}
