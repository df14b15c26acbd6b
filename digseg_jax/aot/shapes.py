# SPDX-License-Identifier: Apache-2.0
"""Tasks and batches of shapes without values: nothing is downloaded, read or computed."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from digseg_jax import assets
from digseg_jax.arraytypes import Array, Batch, Params, Shapes
from digseg_jax.config.schema import ComputeConfig, DataConfig, LossConfig, ModelConfig
from digseg_jax.data.sources import parts_of, spec_of
from digseg_jax.data.vocabulary import bank_prompts
from digseg_jax.models import functional
from digseg_jax.models.remat import activation_bytes
from digseg_jax.models.unet import UNetConfig
from digseg_jax.models.vae import VaeConfig
from digseg_jax.models.vae_tiny import TinyVaeConfig
from digseg_jax.segmentation.codec import Codec
from digseg_jax.segmentation.codecs import make_codec
from digseg_jax.training.tasks.base import Trainable
from digseg_jax.training.tasks.parts import (
    ANCHORS,
    Parts,
    Vae,
    adapt_unet,
    anchors_for_cache,
    bank_shape,
    compute_options,
    new_parameters,
)
from digseg_jax.training.tasks.segmentation import SegmentationTask
from digseg_jax.training.tasks.unet_start import PromptShape, empty_length, empty_shape, native_text
from digseg_jax.weights import catalog, load_config
from digseg_jax.weights.registry import component_of_config
from digseg_jax.weights.text_tower import TEXT_CLASSES

CLIP_TOKENS = 77  # positions of every CLIP text encoder that the catalog names


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Architecture of a segmentation model.

    text_width: features per token of the text encoder.
    empty: the empty prompt of the U-Net's own text encoder; None without a parallel text pathway.
    """

    unet: UNetConfig
    vae: VaeConfig | TinyVaeConfig
    text_width: int
    empty: PromptShape | None = None

    @classmethod
    def of(cls, model: ModelConfig) -> Architecture:
        """Architecture by the table of known repositories, or else by each component's `config.json`.

        Raises:
          UserError: a component that is neither known nor there.
        """
        empty = _empty(model) if model.text_injection == "parallel" else None
        return cls(_unet(model.unet), _vae(model.vae), _text_width(model.text), empty)


def _unet(spec: str) -> UNetConfig:
    """Configuration of the U-Net."""
    repository = catalog.find(spec)
    if repository is None:
        return load_config(assets.resolve(spec), expect="UNet2DConditionModel")
    return UNetConfig(**repository.unet)


def _vae(spec: str) -> VaeConfig | TinyVaeConfig:
    """Configuration of the autoencoder; known ones have the defaults of their class."""
    repository = catalog.find(spec)
    if repository is None:
        return load_config(assets.resolve(spec), expect=("AutoencoderKL", "AutoencoderTiny"))
    return TinyVaeConfig() if repository.name == "taesd" else VaeConfig()


def _text_width(spec: str) -> int:
    """Features per token of the text encoder."""
    repository = _text(spec)
    if repository is None:
        return load_config(assets.resolve(spec), expect=TEXT_CLASSES).hidden_size
    return repository.text_width


def _empty(model: ModelConfig) -> PromptShape:
    """Shape of the empty prompt that a parallel text pathway starts with."""
    repository = _text(native_text(model))
    if repository is None:
        return empty_shape(model)
    length = empty_length(model, causal=not repository.masks_padding, longest=CLIP_TOKENS)
    return PromptShape(length, repository.text_width)


def _text(spec: str) -> catalog.Known | None:
    """The table's entry for a text encoder; None if the table does not have it."""
    repository = catalog.find("all-minilm-l6-v2" if spec == "minilm" else spec)
    return repository if repository and repository.text_width else None


def abstract_parts(
    data: DataConfig,
    model: ModelConfig,
    compute: ComputeConfig,
    loss: LossConfig,
    architecture: Architecture | None = None,
    prompts: int | None = None,
) -> Parts:
    """What `load_parts` returns, as `jax.ShapeDtypeStruct`s; the task's programs are the real ones.

    Args:
      architecture: by default the configuration's.
      prompts: size of the prompt bank; by default the data set's.

    Raises:
      UserError: a component that is neither known nor there.
    """
    # The autoencoder: only its structure is built.
    architecture = architecture or Architecture.of(model)
    autoencoder = component_of_config(architecture.vae).model_class
    graphdef, abstract = functional.abstract(
        lambda: autoencoder(
            architecture.vae, rngs=functional.FixedRngs(), **compute_options(model, compute)
        )
    )
    vae = Vae(graphdef, architecture.vae, compute.vae_batch)

    # What a codec chooses are constants of the program, whatever their values.
    codec = make_codec(model.codec, data)
    codec.assume(architecture.vae.latent_channels)
    if prompts is None:
        prompts = len(codec.texts(bank_prompts(data)))

    # Frozen arguments of the train step, as a run has them.
    frozen: Params = {"vae": abstract, "bank": bank_shapes(prompts, model, architecture)}
    anchors = jax.eval_shape(lambda: anchors_for_cache(codec, data, loss))
    if anchors is not None:
        frozen[ANCHORS] = _float(len(anchors), *_latent_shape(data, architecture))
    stored, width = architecture.unet, architecture.text_width
    unet = adapt_unet(stored, vae, model, width, lambda _: architecture.empty or empty_shape(model))
    new = new_parameters(model, stored, unet)
    return Parts(vae, codec, unet, ("",) * prompts, frozen, new=new)


class UNetTask(Trainable):
    """The U-Net's share of training: latents, tokens and targets come with the batch.

    The work that other trainers of Stable Diffusion report, for comparisons.
    """

    def __init__(self, segmentation: SegmentationTask):
        self.frozen: Params = {}
        self.config, self.new = segmentation.config, segmentation.new
        self.graphdef, self.abstract = segmentation.graphdef, segmentation.abstract
        self.unet_config, self.vae = segmentation.unet_config, segmentation.vae

    def activation_bytes(self) -> float:
        """Estimated bytes of the U-Net's activations per image, which is one latent here."""
        data, compute, model = self.config.data, self.config.compute, self.config.model
        cells = (data.image_size // self.vae.config.factor) ** 2
        channels = self.unet_config.block_out_channels[0]
        return activation_bytes(cells, channels, model.dtype, compute.remat)

    def loss(
        self, params: Params, frozen: Params, batch: Batch, keys: Array, whole: Batch | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Mean squared error of the U-Net's prediction."""
        unet = functional.merge(self.graphdef, params)
        prediction = unet(batch["latent"], batch["timestep"], batch["tokens"])
        return jnp.square(prediction - batch["target"]).mean(), {}


def bank_shapes(prompts: int, model: ModelConfig, architecture: Architecture) -> Params:
    """Shapes of a prompt bank: tokens [prompts, length, width] and mask [prompts, length]."""
    shape = bank_shape(prompts, model, architecture.text_width)
    return {
        "tokens": jax.ShapeDtypeStruct(shape, jnp.float32),
        "mask": jax.ShapeDtypeStruct(shape[:2], jnp.bool_),
    }


def train_batch(data: DataConfig, codec: Codec, architecture: Architecture, images: int) -> Shapes:
    """Shapes of a batch as the data's stream hands it to the train step."""
    square, queries = (images, data.image_size, data.image_size), (images, data.num_queries)
    batch = {
        "image": _int(np.uint8, *square, 3),
        "label": _int(np.int32, *square),
        "query": _int(np.int32, *queries),
        "query_class": _int(np.int32, *queries),
        "query_kind": _int(np.int32, *queries),
        "index": _int(np.uint32, images),
    }

    # Nested classes have several ids per mask.
    specs = [spec_of(part) for part in parts_of(data)]
    covered = max(len(s.covers(c)) for s in specs for c in range(s.num_classes))
    if covered > 1:
        batch["query_class"] = _int(np.int32, *queries, covered)

    # A cache replaces the image by latents.
    if data.latent_cache:
        del batch["image"]
        masks = codec.num_images(data.num_queries)
        latent = _latent_shape(data, architecture)
        batch["image_latent"] = _float(images, *latent)
        batch["mask_latent"] = _float(images, masks, *latent)

    # A mixture's crops say which data set they are of: its loss is logged.
    if data.mixture:
        batch["part"] = _int(np.int32, images)

    return batch


def unet_batch(data: DataConfig, model: ModelConfig, architecture: Architecture, images: int) -> Shapes:
    """Shapes of a batch for `UNetTask`: one latent per image."""
    side, _, channels = _latent_shape(data, architecture)

    # As many tokens as the codec makes of the texts about an image.
    codec = make_codec(model.codec, data)
    codec.assume(channels)
    bank = bank_shapes(len(codec.texts(("",) * data.num_queries)), model, architecture)
    made, _ = jax.eval_shape(lambda b: codec.context(b["tokens"][None], b["mask"][None]), bank)
    tokens = _float(images, *made.shape[2:])
    return {
        "latent": _float(images, side, side, 2 * channels),
        "target": _float(images, side, side, channels),
        "timestep": _int(np.int32, images),
        "tokens": tokens,
        "index": _int(np.uint32, images),
    }


def view_batch(
    model: ModelConfig, architecture: Architecture, views: int, size: tuple[int, int], texts: int
) -> Shapes:
    """Shapes of a batch for `prediction.programs.sample_latents`."""
    bank = bank_shapes(texts, model, architecture)
    encoded = {n: jax.ShapeDtypeStruct((views, *x.shape), x.dtype) for n, x in bank.items()}
    return encoded | {"crops": _int(np.uint8, views, *size, 3), "index": _int(np.int32, views)}


def latent_batch(
    architecture: Architecture,
    views: int,
    size: tuple[int, int],
    images: int,
    members: int,
    queries: int,
) -> Shapes:
    """Shapes of a batch for `prediction.programs.read_masks`.

    images: mask images per view, which show its queries.
    """
    cells = (
        size[0] // architecture.vae.factor,
        size[1] // architecture.vae.factor,
        architecture.vae.latent_channels,
    )
    return {
        "latents": _float(views, images, members, *cells),
        "bias": _float(views, queries),
    }


def _latent_shape(data: DataConfig, architecture: Architecture) -> tuple[int, int, int]:
    """Shape [h, w, c] of an image's latent in training."""
    side = data.image_size // architecture.vae.factor
    return side, side, architecture.vae.latent_channels


def _float(*shape: int) -> jax.ShapeDtypeStruct:
    """A float32 array's shape."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _int(dtype: type, *shape: int) -> jax.ShapeDtypeStruct:
    """An integer array's shape."""
    return jax.ShapeDtypeStruct(shape, dtype)
