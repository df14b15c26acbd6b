# SPDX-License-Identifier: Apache-2.0
"""Parameters of the U-Net at step 0: a checkpoint's, and the start of what the checkpoint lacks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from digseg_jax import assets, trees
from digseg_jax.arraytypes import Array, Float, Params
from digseg_jax.config.schema import ModelConfig
from digseg_jax.errors import UserError
from digseg_jax.io.files import expanded
from digseg_jax.log import log
from digseg_jax.models import functional
from digseg_jax.models.layers import Compute
from digseg_jax.models.text.clip_text import ClipTextConfig
from digseg_jax.models.text_adapters import TextAdapter
from digseg_jax.models.text_branch import ADAPTERS, ZERO_INIT, lacking, start_branch
from digseg_jax.models.unet import UNetConfig
from digseg_jax.packages import minilm_folder
from digseg_jax.segmentation.prompt_bank import encode_prompts, with_sentence_token
from digseg_jax.weights import TextTower, load_config, load_text_tower, load_unet_params
from digseg_jax.weights.text_tower import TEXT_CLASSES


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

    # A pipeline's folders lie side by side, in a repository and on the disk, or in a single file.
    repository, _, part = model.unet.rpartition(":")
    if part == "unet":
        return f"{repository}:text_encoder"
    folder = expanded(assets.resolve(model.unet))
    if folder.is_file():
        return str(folder)
    beside = folder.parent / "text_encoder"
    return str(beside) if folder.name == "unet" and beside.is_dir() else model.text


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
    spec = native_text(model)
    folder = minilm_folder() if spec == "minilm" else assets.resolve(spec)
    config = load_config(folder, expect=TEXT_CLASSES)
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
    spec = native_text(model)
    if tower is None or spec != model.text:
        tower = load_text_tower(assets.resolve(spec))
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
