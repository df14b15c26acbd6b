# SPDX-License-Identifier: Apache-2.0
"""trainval_merged.json of PASCAL in Detail: images with their phase, run-length masks by category.

The file has hundreds of megabytes, most of them parts and instances: only the two lists that the
labels need are parsed, one element at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from digseg_jax.data.datasets.decode import SizeError
from digseg_jax.data.datasets.readers import rle
from digseg_jax.io.files import UnreadableError, read_bytes

_MAX_FILE = 4 * 2**30  # bytes

Masks = list[tuple[int, dict[str, Any]]]  # (category of the 459, run-length mask) in the file's order


class DetailJson:
    """Phases and masks of all images.

    Attributes:
      phases: {image stem: "train" or "val"}.
      masks: {image stem: its masks in the file's order}.

    Raises:
      UnreadableError: no such file, or not of this form.
    """

    def __init__(self, path: Path):
        text = _text(path)
        stems: dict[Any, str] = {}
        self.phases: dict[str, str] = {}
        self.masks: dict[str, Masks] = {}

        # Masks name their image by id, labels go by file stem.
        try:
            for image in _elements(path, text, "images"):
                stems[image["image_id"]] = stem = Path(str(image["file_name"])).stem
                self.phases[stem] = str(image["phase"])
            for row in _elements(path, text, "annos_segmentation"):
                mask = (int(row["category_id"]), row["segmentation"])
                self.masks.setdefault(stems[row["image_id"]], []).append(mask)
        except (KeyError, TypeError, ValueError) as error:
            # `_elements` has raised its own, more precise error.
            if isinstance(error, UnreadableError):
                raise
            raise UnreadableError(f"{path}: an entry has an unexpected form: {error!r}") from error


def paint(masks: Masks, size: tuple[int, int], where: str) -> np.ndarray:
    """Paints category ids, int32 [h, w]: a later mask wins, pixels without one are 0.

    Raises:
      UnreadableError: broken run lengths.
      SizeError: a mask that differs from the image in size.
    """
    # In the file's order: overlapping masks are painted over each other.
    raw = np.zeros(size, np.int32)
    for category, segmentation in masks:
        try:
            height, width = (int(v) for v in segmentation["size"])
            if (height, width) != size:  # checked before allocating anything
                raise SizeError(
                    f"{where}: a mask of {width}x{height} (width x height) for an image of "
                    f"{size[1]}x{size[0]}"
                )

            raw[rle.decode(segmentation["counts"], height, width)] = category
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            if isinstance(error, SizeError):  # a ValueError too, and complete as it is
                raise
            raise UnreadableError(f"{where}: broken mask of category {category}: {error}") from error
    return raw


def _text(path: Path) -> str:
    """The whole file as text."""
    try:
        return read_bytes(path, limit=_MAX_FILE).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"{path}: not UTF-8: {error}") from error


def _elements(path: Path, text: str, key: str) -> Iterator[dict[str, Any]]:
    """Objects of the list under a top-level key, decoded one at a time.

    Raises:
      UnreadableError: no such list, or damaged JSON.
    """
    decoder, white = json.JSONDecoder(), " \t\r\n"

    def skip(position: int) -> int:
        """Position of the next character that is not white space."""
        while text[position : position + 1] and text[position] in white:
            position += 1
        return position

    # Search for the key's text instead of parsing everything before it.
    position = text.find(f'"{key}"')
    opening = skip(text.find(":", position) + 1) if position >= 0 else -1
    if opening < 0 or text[opening : opening + 1] != "[":
        raise UnreadableError(f"{path}: holds no list {key!r}")

    # `raw_decode` reads one element and returns where it ends; the commas between are skipped here.
    position = skip(opening + 1)
    while text[position : position + 1] != "]":
        try:
            element, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise UnreadableError(f"{path}: the JSON is damaged: {error}") from error
        if not isinstance(element, dict):
            raise UnreadableError(f"{path}: {key!r} holds something other than objects")
        yield element
        position = skip(position)
        if text[position : position + 1] == ",":
            position = skip(position + 1)
