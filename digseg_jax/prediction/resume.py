# SPDX-License-Identifier: Apache-2.0
"""Which images of a folder need no second prediction: theirs is complete, and would be the same."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import digseg_jax
from digseg_jax.io.files import TooLargeError, read_bytes
from digseg_jax.io.workdir import CALIBRATION
from digseg_jax.prediction.description import FILE, unet_folder
from digseg_jax.prediction.targets import PredictionFiles, read_summary
from digseg_jax.weights.safetensors_io import weight_files


def identity_of(
    folder: Path, settings: Sequence[Any], queries: Sequence[str], colors: Sequence[Any]
) -> str:
    """Digest of all that a prediction's files depend on: weights, settings, queries, colors, version.

    Weights are identified by their description, sizes and times, as reading them would take longer
    than an image; a copy of them counts as another model.

    Args:
      folder: the exported weights.
      settings: what else changes the masks, JSON-ready.
      queries, colors: the words and their RGB.
    """
    files = [
        (p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in weight_files(unet_folder(folder))
    ]
    small = [(folder / name) for name in (FILE, CALIBRATION)]
    texts = [path.read_text(encoding="utf-8") for path in small if path.is_file()]
    colors = [[int(c) for c in color] for color in colors]
    facts = [digseg_jax.__version__, files, texts, list(settings), list(queries), colors]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]


def marks_of(image: Path, identity: str) -> dict[str, Any]:
    """Entries of NAME.json by which `is_done` knows a prediction again.

    A file too large to be read again is known by its size and time.

    Raises:
      UnreadableError: the image's file cannot be read.
    """
    try:
        content = {"image_crc32": zlib.crc32(read_bytes(image))}
    except TooLargeError:
        content = {"image_bytes": image.stat().st_size, "image_time": image.stat().st_mtime_ns}
    return {"made_with": identity, **content}


def is_done(files: PredictionFiles, image: Path, identity: str) -> bool:
    """Whether a prediction is complete, and of this image with this identity.

    Raises:
      UnreadableError: the image's file cannot be read.
    """
    found = read_summary(files)
    if found is None or found.get("made_with") != identity or not found.get("complete"):
        return False
    return all(file.is_file() for file in files) and found | marks_of(image, identity) == found
