# SPDX-License-Identifier: Apache-2.0
"""The frozen text tower: model and tokenizer from one folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from digseg_jax.arraytypes import Params
from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.segmentation.tokenizer import Tokenizer
from digseg_jax.weights.carriers import minilm_folder
from digseg_jax.weights.hub import resolve
from digseg_jax.weights.load import load_component


@dataclass(frozen=True)
class TextTower:
    """What `segmentation.text_bank.encode_prompts` needs.

    Attributes:
        graphdef: structure of the model, for `models.functional.merge`.
        params: its parameters.
        tokenizer: texts to ids.
        width: channels of a token.
        max_length: most tokens that the model has positions for.
    """

    graphdef: nnx.GraphDef
    params: Params
    tokenizer: Tokenizer
    width: int
    max_length: int


def load_text_tower(spec: str, *, dtype: jnp.dtype | None = None) -> TextTower:
    """Loads a text tower for inference.

    Args:
        spec: "minilm" (the pip package's all-MiniLM-L6-v2), a folder, or a hub id such as
            sentence-transformers/all-MiniLM-L6-v2.
        dtype: compute dtype, float32 if None.

    Raises:
        UserError: package, folder or hub id not there, or the folder lacks a tokenizer.
    """
    folder = minilm_folder() if spec == "minilm" else resolve(spec)
    model = load_component(folder, dtype=dtype, expect="BertModel")
    graphdef, params = functional.split(model)
    config = model.config
    return TextTower(
        graphdef,
        params,
        load_tokenizer(folder),
        width=config.hidden_size,
        max_length=config.max_position_embeddings,
    )


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Builds the tokenizer from tokenizer.json, or from vocab.txt where that is missing.

    Raises:
        UserError: neither file is there, or it is malformed.
    """
    folder = Path(folder)
    fast, vocab, settings = (
        folder / name for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json")
    )
    try:
        if fast.is_file():
            return Tokenizer.from_json(fast.read_text(encoding="utf-8"))
        if vocab.is_file():
            values = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
            words = vocab.read_text(encoding="utf-8").rstrip("\n").split("\n")
            return Tokenizer.from_vocab(words, values)
    except ValueError as error:  # UserError and malformed JSON or UTF-8
        raise UserError(f"{folder}: {error}") from error
    raise UserError(f"no tokenizer.json and no vocab.txt in {folder}")
