# SPDX-License-Identifier: Apache-2.0
"""Loads the frozen text encoder: model and tokenizer from one folder, or from a pipeline's two."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flax import nnx

from digseg_jax.arraytypes import DTypeLike, Params
from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.models.text.clip_text import CLIPTextModel, without_last_layers
from digseg_jax.models.text.tokenizer import Tokenizer
from digseg_jax.packages import minilm_folder
from digseg_jax.weights.catalog import hub_id
from digseg_jax.weights.hub import TOKENIZER, resolve, resolve_tokenizer
from digseg_jax.weights.load import load_component
from digseg_jax.weights.single_file import is_second_generation
from digseg_jax.weights.tokenizer_files import has_tokenizer, load_tokenizer

# A CLIPModel, or an encoder with a projection, is read as the plain encoder: only tokens are wanted.
TEXT_CLASSES = ("CLIPTextModel", "BertModel", "HFTextEncoder")
# Single files of 1.x and 2.x: a pipeline with the same tokenizer, and the token that pads a text.
_FAMILIES = (("sd-1.5", "<|endoftext|>"), ("sd-2.1", "!"))


@dataclass(frozen=True)
class TextTower:
    """A text encoder with its tokenizer, as `segmentation.prompt_bank.encode_prompts` needs it.

    Attributes:
        graphdef: structure of the model, for `models.functional.merge`.
        params: its parameters, on the host.
        tokenizer: from texts to ids.
        width: channels of a token.
        max_length: most tokens that the model has positions for.
        causal: tokens see only earlier tokens; such encoders (CLIP's) were trained without a mask.
    """

    graphdef: nnx.GraphDef
    params: Params
    tokenizer: Tokenizer
    width: int
    max_length: int
    causal: bool


def load_text_tower(spec: str, *, dtype: DTypeLike | None = None, skip_layers: int = 0) -> TextTower:
    """Loads a text encoder for inference: CLIP, BERT, or open_clip's BERT (BiomedCLIP).

    Args:
        spec: "minilm" (the pip package's all-MiniLM-L6-v2), a folder, a single file with a whole Stable
          Diffusion, a hub id such as openai/clip-vit-large-patch14, or a name of
          `digseg_jax.weights.catalog`. `load_tower_tokenizer` says where the tokenizer is.
        dtype: compute dtype, float32 if None.
        skip_layers: last layers of a CLIP encoder to leave out, see `without_last_layers`.

    Raises:
        UserError: the package, folder or hub id is not there, the folder lacks a tokenizer, or layers
          are to be skipped in an encoder that is not CLIP's.
    """
    # The pip package's files are on the disk; everything else is found by the rules of `resolve`.
    folder = minilm_folder() if spec == "minilm" else resolve(spec)
    model = load_component(folder, dtype=dtype, expect=TEXT_CLASSES)

    # Stable Diffusion 2.x uses the output of the penultimate layer.
    if skip_layers:
        if not isinstance(model, CLIPTextModel):
            name = type(model).__name__
            raise UserError(f"{folder} holds a {name}; only CLIP text towers can skip layers")
        model = without_last_layers(model, skip_layers)

    graphdef, params = functional.split(model)
    config = model.config  # type: ignore[attr-defined]  # every tower has one
    return TextTower(
        graphdef,
        params,
        load_tower_tokenizer(folder),
        width=config.hidden_size,
        max_length=config.max_position_embeddings,
        causal=isinstance(model, CLIPTextModel),
    )


def load_tower_tokenizer(folder: Path) -> Tokenizer:
    """Loads the tokenizer of a text encoder.

    folder: of the encoder; the tokenizer is there, or in `tokenizer` beside a pipeline's
      `text_encoder`. A single file has one in `tokenizer` beside it, or takes its family's from
      the hub.

    Raises:
      UserError: none is found.
    """
    # Stable Diffusion's pipelines have unet/, vae/, text_encoder/ and tokenizer/ side by side.
    beside = folder.parent / TOKENIZER
    if folder.is_file():
        return _of_family(folder, beside)
    own = has_tokenizer(folder) or folder.name != "text_encoder" or not beside.is_dir()
    return load_tokenizer(folder if own else beside)


def _of_family(file: Path, beside: Path) -> Tokenizer:
    """The tokenizer of a single file: both families have the same words, and pad in two ways."""
    family, pad = _FAMILIES[is_second_generation(file)]
    if has_tokenizer(beside):
        return load_tokenizer(beside, pad)
    try:
        return load_tokenizer(resolve_tokenizer(hub_id(family)), pad)
    except UserError as error:
        raise type(error)(
            f"{file} has no tokenizer, and {error}; or put CLIP's vocab.json and merges.txt into "
            f"{beside}"
        ) from error
