# SPDX-License-Identifier: Apache-2.0
"""The codecs by name, and the file beside trained weights that holds what one of them chose."""

from __future__ import annotations

import json
from pathlib import Path

from digseg_jax.config.schema import DataConfig
from digseg_jax.errors import UserError
from digseg_jax.io.json_file import read_json
from digseg_jax.segmentation.binary import BinaryCodec
from digseg_jax.segmentation.codec import Codec
from digseg_jax.segmentation.palette import PaletteCodec
from digseg_jax.segmentation.prompted import PromptedCodec

CODECS: dict[str, type[Codec]] = {c.name: c for c in (BinaryCodec, PaletteCodec, PromptedCodec)}


def make_codec(name: str, data: DataConfig, classes: int | None = None) -> Codec:
    """The codec of that name (`config.model.codec`) for the data; `classes` as in `Codec.for_data`.

    Raises:
      UserError: the codec cannot carry those data, or not their cached latents.
    """
    if data.latent_cache:
        check_cacheable(name)
    return CODECS[name].for_data(data, classes)


def check_cacheable(name: str) -> None:
    """Raises UserError if the codec draws mask images at random for every example."""
    if CODECS[name].redrawn:
        legal = ", ".join(codec.name for codec in CODECS.values() if not codec.redrawn)
        raise UserError(
            f"config.model.codec={name!r}: its masks are drawn at random for every example and cannot "
            f"be cached; with cached latents legal are {legal}"
        )


def save_state(codec: Codec, folder: Path) -> None:
    """Writes FOLDER/CODEC.json: with other colors, say, the weights' output would be misread."""
    if state := codec.state():
        text = json.dumps(state, indent=1)
        state_file(codec.name, folder).write_text(text + "\n", encoding="utf-8")


def load_state(codec: Codec, folder: Path) -> None:
    """Takes over what was stored beside the weights of `folder`.

    Raises:
      UserError: there is no state for this codec, it is damaged, or of other classes.
    """
    path = state_file(codec.name, folder)
    stored = read_json(path) if path.is_file() else {}
    try:
        codec.restore(stored)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def state_file(name: str, folder: Path) -> Path:
    """Where weights in `folder` keep the state of the codec `name`."""
    return folder / f"{name}.json"
