# SPDX-License-Identifier: Apache-2.0
"""Parameters of the U-Net at step 0: a checkpoint's, and the start of what the checkpoint lacks."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from digseg_jax import assets, trees
from digseg_jax.arraytypes import Array, Float, Params
from digseg_jax.config.schema import ModelConfig
from digseg_jax.errors import UserError
from digseg_jax.io.files import expanded
from digseg_jax.io.storage import as_path, explained, is_remote
from digseg_jax.log import log
from digseg_jax.models import functional
from digseg_jax.models.layers import Compute
from digseg_jax.models.text.clip_text import ClipTextConfig
from digseg_jax.models.text_adapters import TextAdapter
from digseg_jax.models.text_branch import ADAPTERS, ZERO_INIT, lacking, start_branch
from digseg_jax.models.unet import UNetConfig
from digseg_jax.packages import minilm_folder
from digseg_jax.segmentation.prompt_bank import encode_prompts, with_sentence_token
from digseg_jax.weights import TextTower, catalog, load_config, load_text_tower, load_unet_params
from digseg_jax.weights.text_tower import TEXT_CLASSES

_UNET, _ENCODER = "unet", "text_encoder"  # folders of a pipeline


class _Tower(NamedTuple):
    """Size of a CLIP text encoder."""

    layers: int
    width: int


_WHOLE_H14 = _Tower(24, 1024)  # OpenCLIP's ViT-H/14, of which Stable Diffusion 2.x has 23 layers


class PromptShape(NamedTuple):
    """Tokens of a text encoder's empty prompt, and their width."""

    length: int
    width: int


def native_text(model: ModelConfig) -> str:
    """The text encoder whose empty prompt the U-Net's own cross-attention reads in a parallel pathway.

    `model.unet_text`; else the encoder of the pipeline that the U-Net is from, such as
    sd-2.1:text_encoder for sd-2.1:unet; else the encoder of the queries.
    """
    if model.unet_text:
        return model.unet_text

    # A pipeline's folders lie side by side in a repository, maybe below another folder of it.
    remote = is_remote(model.unet)
    repository, _, part = model.unet.rpartition(":")
    if not remote and re.search(r"(^|/)unet$", part) and repository:
        return f"{repository}:{part.removesuffix(_UNET)}{_ENCODER}"

    # On the disk and in a bucket too, or they are in a single file.
    place = as_path(model.unet) if remote else expanded(assets.resolve(model.unet))
    with explained(place, "cannot be read"):
        if place.is_file():
            return os.fspath(place)
        beside = place.parent / _ENCODER
        return os.fspath(beside) if place.name == _UNET and beside.is_dir() else model.text


def skipped_layers(model: ModelConfig) -> int:
    """Last layers to leave out of `native_text`, for the output that the U-Net was trained with.

    Stable Diffusion 2.x reads the penultimate layer, and its pipelines come with an encoder of 23 of
    the 24 layers. Where a whole one is named instead, the layer that the pipeline's lacks is left out;
    where the pipeline's is not known, a warning is logged.

    Raises:
      UserError: there is no such encoder.
    """
    spec = native_text(model)
    if spec == model.text and model.text_skip_layers:  # the encoder of the queries, as it is configured
        return model.text_skip_layers
    config = _encoder_config(spec)
    if not isinstance(config, ClipTextConfig):
        return 0

    whole = _Tower(config.num_hidden_layers, config.hidden_size)
    own = _pipeline_tower(model)
    if own == whole._replace(layers=whole.layers - 1):
        log.info("start: %s without its last layer, as the encoder of the U-Net's pipeline", spec)
        return 1

    # Only such U-Nets take tokens of this width, and `prompt_length` has refused any other.
    if whole == _WHOLE_H14 and own in (None, whole):
        log.warning(
            "start: %s has 24 layers, Stable Diffusion 2.x was trained with the output of the 23rd; "
            "if %s descends from it, set config.model.unet_text to its pipeline's text_encoder, or, if "
            "the queries have the same encoder, config.model.text_skip_layers to 1",
            *(spec, model.unet),
        )
    return 0


def _pipeline_tower(model: ModelConfig) -> _Tower | None:
    """Size of the text encoder in the U-Net's pipeline; None: not known without a download."""
    own = native_text(dataclasses.replace(model, unet_text=""))
    known = catalog.find(own)
    if known is not None:
        penultimate = known.parts and known.text_width == _WHOLE_H14.width
        return _WHOLE_H14._replace(layers=_WHOLE_H14.layers - 1) if penultimate else None
    if is_remote(own) or not expanded(own).exists():
        return None
    config = _encoder_config(own)
    found = isinstance(config, ClipTextConfig)
    return _Tower(config.num_hidden_layers, config.hidden_size) if found else None


def _encoder_config(spec: str) -> Any:
    """The configuration of a text encoder."""
    folder = minilm_folder() if spec == "minilm" else assets.resolve(spec)
    return load_config(folder, expect=TEXT_CLASSES)


def empty_length(model: ModelConfig, *, causal: bool, longest: int) -> int:
    """Number of tokens of the empty prompt, as U-Nets are trained with it.

    Stable Diffusion attends to all tokens of a CLIP, which is causal, padding included. Of other
    encoders only the real tokens count: the two that begin and end a text, and the sentence token.
    """
    return longest if causal else 2 + model.sentence_token


def empty_shape(model: ModelConfig) -> PromptShape:
    """Shape of the empty prompt of `native_text`; of its encoder only config.json is read.

    Raises:
      UserError: there is no such encoder.
    """
    config = _encoder_config(native_text(model))
    causal, longest = isinstance(config, ClipTextConfig), config.max_position_embeddings
    return PromptShape(empty_length(model, causal=causal, longest=longest), config.hidden_size)


def prompt_length(
    model: ModelConfig, stored: UNetConfig, empty: Callable[[ModelConfig], PromptShape] = empty_shape
) -> int:
    """Tokens of the prompt that the cross-attentions keep for themselves; 0: they read the text.

    stored: the checkpoint's configuration.
    empty: shape of the prompt that a new parallel pathway starts with.

    Raises:
      UserError: the checkpoint has a parallel pathway that the configuration lacks, or its
        cross-attention takes tokens of another width than the prompt's.
    """
    if model.text_injection != "parallel":
        if stored.prompt_length:
            raise UserError(
                f"config.model.text_injection={model.text_injection!r}: {model.unet} reads its text in "
                "parallel attentions; set it to 'parallel'"
            )
        return 0
    if stored.prompt_length:
        return stored.prompt_length

    # Adapters that come with the checkpoint belong to the text that it was trained with.
    length, width = empty(model)
    wanted = stored.text_width if stored.text_adapters else stored.cross_attention_dim
    if width != wanted:
        raise UserError(
            f"config.model.text_injection='parallel': {model.unet} was trained with text tokens "
            f"{wanted} wide, those of {native_text(model)} are {width}; name the text encoder of that "
            "training in config.model.unet_text"
        )
    return length


def initial_unet(
    model: ModelConfig, config: UNetConfig, abstract: Params, tower: TextTower | None, seed: int
) -> Params:
    """The pretrained U-Net with conv_in widened to the inputs of `config`, or random weights.

    A parallel pathway starts without effect: the network then computes what the pretrained one does
    with the empty prompt.

    Args:
      model: names the checkpoint, and the text encoder that it was trained with.
      config: architecture.
      abstract: shapes of its parameters.
      tower: encodes the queries; None to load it where it is needed.
      seed: of the parameters that the checkpoint lacks.

    Raises:
      UserError: the checkpoint does not fit.
    """
    if model.unet_init == "random":
        return functional.random_init(abstract, seed, zero=ZERO_INIT)

    # The checkpoint as it is. Where a parallel pathway starts, adapters that are not wanted any more
    # still adapt the prompt; otherwise nothing may be left over.
    source = assets.resolve(model.unet)
    stored = load_config(source, expect="UNet2DConditionModel")
    starts = config.prompt_length and not stored.prompt_length
    base = dataclasses.replace(
        config,
        prompt_length=stored.prompt_length,
        mark_width=stored.mark_width,
        text_adapters=stored.text_adapters and bool(starts or config.text_adapters),
        text_dim=(stored if stored.text_adapters or stored.mark_width else config).text_width,
    )
    if stored.in_channels == config.in_channels and not stored.text_adapters:  # not one of ours
        log.info(
            "start: of the %d input channels of %s the first half are taken as the image's latent, the "
            "others as the mask's, as Marigold has them",
            *(stored.in_channels, model.unet),
        )
    loaded = load_unet_params(source, base)
    new = lacking(stored, config)
    if base.text_adapters and ADAPTERS in new:
        log.info(
            "start: new text adapters: those of %s are for tokens %d wide, not %d",
            *(model.unet, stored.text_width, config.text_width),
        )

    # Draw random values only for what the checkpoint lacks: drawing a whole U-Net takes longer than
    # loading it.
    found, wanted = trees.flatten(loaded), trees.flatten(abstract)
    old = {p for p in wanted if p in found and not any(re.search(pattern, p) for pattern in new)}
    rest = trees.unflatten({path: leaf for path, leaf in wanted.items() if path not in old})
    drawn = trees.flatten(functional.random_init(rest, seed, zero=ZERO_INIT))
    params = trees.unflatten({p: found[p] if p in old else drawn[p] for p in wanted})

    if not starts:
        return params
    return start_branch(params, _native_prompts(model, base, loaded, tower))


def _native_prompts(
    model: ModelConfig, stored: UNetConfig, params: Params, tower: TextTower | None
) -> list[Float[Array, "m d"]]:
    """The empty prompt as each level's cross-attention reads it, the highest resolution first."""
    spec, skipped = native_text(model), skipped_layers(model)
    if tower is None or spec != model.text or skipped != model.text_skip_layers:
        tower = load_text_tower(assets.resolve(spec), skip_layers=skipped)
    tokens = jnp.asarray(encode_empty(tower, model))

    # A checkpoint's own adapters are part of what it was trained with.
    levels = range(len(stored.block_out_channels))
    if not stored.text_adapters:
        return [tokens for _ in levels]
    graphdef, _ = functional.abstract(
        lambda: TextAdapter(
            stored.text_width, stored.text_features, compute=Compute(), rngs=functional.FixedRngs()
        )
    )
    adapters = [functional.merge(graphdef, params["text_adapters"][str(level)]) for level in levels]
    return [adapter(tokens[None])[0] for adapter in adapters]


def encode_empty(tower: TextTower, model: ModelConfig) -> Float[np.ndarray, "m d"]:
    """Tokens of a text encoder's empty prompt; `empty_length` says how many."""
    bank = encode_prompts(
        tower.graphdef,
        tower.params,
        tower.tokenizer.padded,
        ("",),
        max_length=tower.max_length if tower.causal else 2,
        mask_padding=not tower.causal,
    )
    if model.sentence_token and not tower.causal:
        bank = with_sentence_token(bank)
    return bank.tokens[0]
