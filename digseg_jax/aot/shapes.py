# SPDX-License-Identifier: Apache-2.0
"""Tasks and batches of shapes without values: nothing is downloaded, read or computed."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from digseg_jax import assets
from digseg_jax.arraytypes import Array, Batch, Params
from digseg_jax.config.schema import Config, ModelConfig
from digseg_jax.data.sources import parts_of, spec_of
from digseg_jax.data.vocabulary import bank_prompts
from digseg_jax.models import functional
from digseg_jax.models.unet import UNet2DConditionModel, UNetConfig
from digseg_jax.models.vae import VaeConfig
from digseg_jax.models.vae_tiny import TinyVaeConfig
from digseg_jax.segmentation.latent_probe import LatentProbe
from digseg_jax.segmentation.palette import Palette
from digseg_jax.training.tasks.components import Vae, compute_options, schedule_of, unet_options
from digseg_jax.training.tasks.segmentation import MASK_ENDS, SegmentationTask, wants_mask_ends
from digseg_jax.weights import catalog, load_config
from digseg_jax.weights.registry import component_of_config
from digseg_jax.weights.text_tower import TEXT_CLASSES


@dataclasses.dataclass(frozen=True)
class Parts:
    """Architecture of a segmentation model.

    text_width: features per token of the text encoder.
    """

    unet: UNetConfig
    vae: VaeConfig | TinyVaeConfig
    text_width: int

    @classmethod
    def of(cls, model: ModelConfig) -> Parts:
        """Architecture by the table of known repositories, or else by each component's `config.json`.

        Raises:
          UserError: a component that is neither known nor there.
        """
        return cls(_unet(model.unet), _vae(model.vae), _text_width(model.text))


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
    repository = catalog.find("all-minilm-l6-v2" if spec == "minilm" else spec)
    if repository is None or not repository.text_width:
        return load_config(assets.resolve(spec), expect=TEXT_CLASSES).hidden_size
    return repository.text_width


class ShapeTask(SegmentationTask):
    """The segmentation task with its real programs, but with `jax.ShapeDtypeStruct`s as frozen parts.

    prompts: size of the prompt bank; by default the data set's.
    """

    def __init__(self, config: Config, parts: Parts, prompts: int | None = None):
        model = config.model
        self.config, self.schedule = config, schedule_of(config.diffusion)
        self.codec = config.segmentation.codec

        # The autoencoder: only its structure is built.
        options = compute_options(model)
        autoencoder = component_of_config(parts.vae).model_class
        graphdef, abstract = functional.abstract(
            lambda: autoencoder(parts.vae, rngs=functional.FixedRngs(), **options)
        )
        self.vae = Vae(graphdef, parts.vae, model.vae_limit)

        # Frozen arguments of the train step: autoencoder and prompt bank, as a run has them.
        if prompts is None:
            prompts = 1 if self.codec == "palette" else len(bank_prompts(config.data))
        self.frozen: Params = {"vae": abstract, "bank": bank_shapes(prompts, model, parts)}
        if wants_mask_ends(config):
            self.frozen[MASK_ENDS] = _float(2, *_latent_shape(config, parts))

        # The U-Net reads the image's latent beside the noisy mask's.
        self.unet_config = dataclasses.replace(
            parts.unet,
            in_channels=2 * parts.vae.latent_channels,
            text_adapters=model.text_adapters,
            text_dim=parts.text_width,
        )

        self.graphdef, self.abstract = functional.abstract(
            lambda: UNet2DConditionModel(
                self.unet_config, rngs=functional.FixedRngs(), **unet_options(model)
            )
        )

    def prepare(self) -> None:
        """Does nothing: the autoencoder is not run here."""

    @functools.cached_property
    def palette(self) -> Palette:
        """A palette of zeros: colors are constants of the program, whatever their values."""
        table = np.zeros((self._num_classes(), 3), np.float32)
        return Palette(table, table, 1.0)

    @functools.cached_property
    def palette_latents(self) -> np.ndarray:
        """Latents of the colors, [classes, c], no two alike."""
        size = (self._num_classes(), self.vae.config.latent_channels)
        return np.arange(np.prod(size), dtype=np.float32).reshape(size)

    @functools.cached_property
    def probe(self) -> LatentProbe:
        """A linear latent decoder of zeros."""
        return LatentProbe(np.zeros(self.vae.config.latent_channels, np.float32), 0.0, 1.0)


class UNetTask:
    """The U-Net's share of training: latents, tokens and targets come with the batch.

    The work that other trainers of Stable Diffusion report, for comparisons.
    """

    def __init__(self, config: Config, parts: Parts):
        segmentation = ShapeTask(config, parts, prompts=1)
        self.frozen: Params = {}
        self.graphdef, self.abstract = segmentation.graphdef, segmentation.abstract
        self.unet_config, self.vae = segmentation.unet_config, segmentation.vae

    def prepare(self) -> None:
        """Does nothing: no part of this program is computed ahead."""

    def loss(
        self, params: Params, frozen: Params, batch: Batch, keys: Array, whole: Batch | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Mean squared error of the U-Net's prediction."""
        unet = functional.merge(self.graphdef, params)
        prediction = unet(batch["latent"], batch["timestep"], batch["tokens"])
        return jnp.square(prediction - batch["target"]).mean(), {}


def bank_shapes(prompts: int, model: ModelConfig, parts: Parts) -> Params:
    """Shapes of a prompt bank: tokens [prompts, length, width] and mask [prompts, length]."""
    length = model.max_tokens + int(model.sentence_token)
    return {
        "tokens": jax.ShapeDtypeStruct((prompts, length, parts.text_width), jnp.float32),
        "mask": jax.ShapeDtypeStruct((prompts, length), jnp.bool_),
    }


def train_batch(config: Config, images: int, parts: Parts) -> Batch:
    """Shapes of a batch as the stream of `config.data` hands it to the train step."""
    data = config.data
    square, queries = (images, data.image_size, data.image_size), (images, data.num_queries)
    batch = {
        "image": _int(np.uint8, *square, 3),
        "label": _int(np.int32, *square),
        "query": _int(np.int32, *queries),
        "query_class": _int(np.int32, *queries),
        "index": _int(np.uint32, images),
    }

    # Batches of public data sets have the kind of each query; nested classes have several ids per mask.
    if data.name != "landcover":
        specs = [spec_of(part) for part in parts_of(data)]
        covered = max(len(s.covers(c)) for s in specs for c in range(s.num_classes))
        batch["query_kind"] = _int(np.int32, *queries)
        if covered > 1:
            batch["query_class"] = _int(np.int32, *queries, covered)

    # A cache replaces the image by latents.
    if data.latent_cache:
        del batch["image"]
        masks = 1 if config.segmentation.codec == "palette" else data.num_queries
        latent = _latent_shape(config, parts)
        batch["image_latent"] = _float(images, *latent)
        batch["mask_latent"] = _float(images, masks, *latent)

    return batch


def unet_batch(config: Config, parts: Parts, images: int) -> Batch:
    """Shapes of a batch for `UNetTask`: one latent per image."""
    side, _, channels = _latent_shape(config, parts)
    tokens = bank_shapes(images, config.model, parts)["tokens"]
    return {
        "latent": _float(images, side, side, 2 * channels),
        "target": _float(images, side, side, channels),
        "timestep": _int(np.int32, images),
        "tokens": tokens,
        "index": _int(np.uint32, images),
    }


def view_batch(config: Config, parts: Parts, views: int, size: tuple[int, int], queries: int) -> Batch:
    """Shapes of a batch for `prediction.programs.sample_latents`."""
    bank = bank_shapes(queries, config.model, parts)
    texts = {n: jax.ShapeDtypeStruct((views, *x.shape), x.dtype) for n, x in bank.items()}
    return texts | {"crops": _int(np.uint8, views, *size, 3), "index": _int(np.int32, views)}


def latent_batch(
    parts: Parts, views: int, size: tuple[int, int], queries: int, members: int, classes: int
) -> Batch:
    """Shapes of a batch for `prediction.programs.read_masks`.

    classes: number of masks per view; with a palette more than queries.
    """
    cells = (size[0] // parts.vae.factor, size[1] // parts.vae.factor, parts.vae.latent_channels)
    return {
        "latents": _float(views, queries, members, *cells),
        "bias": _float(views, classes),
    }


def _latent_shape(config: Config, parts: Parts) -> tuple[int, int, int]:
    """Shape [h, w, c] of an image's latent in training."""
    side = config.data.image_size // parts.vae.factor
    return side, side, parts.vae.latent_channels


def _float(*shape: int) -> jax.ShapeDtypeStruct:
    """A float32 array's shape."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _int(dtype: type, *shape: int) -> jax.ShapeDtypeStruct:
    """An integer array's shape."""
    return jax.ShapeDtypeStruct(shape, dtype)
