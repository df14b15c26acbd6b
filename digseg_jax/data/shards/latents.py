# SPDX-License-Identifier: Apache-2.0
"""Cached latents: ArrayRecord shards of what the frozen autoencoder makes of a training split.

    CACHE/NAME/SPLIT/latents.json   counts, sizes, checksums, class statistics, what it was made with
    CACHE/NAME/SPLIT/absent.npy     the latent of a mask that shows nothing (binary codec)
    CACHE/NAME/SPLIT/shard-...      two records an example: as it is, then mirrored

A record is its header's length (uint32, little endian), the header (JSON), the label crop (a PNG as in
`records`) and the latents, float32 [1 + masks, h, w, c]: the picture's, then the mask's of each class
that the crop shows, or with the palette codec the one of all classes. Mirrored crops are encoded too:
the mirror of a latent is not the latent of the mirror.

Latents are stored as the float32 that the autoencoder gives, so that training from them is the same to
rounding: at 512 pixels 64 KB each, 128 KB x (1 + classes shown) an example.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import cv2
import numpy as np
from etils import epath

from digseg_jax.arraytypes import Float, Int
from digseg_jax.config.schema import PartConfig
from digseg_jax.data.datasets.decode import UnreadableError
from digseg_jax.data.datasets.spec import DatasetSpec
from digseg_jax.data.datasets.statistics import ClassStatistics
from digseg_jax.data.shards import files
from digseg_jax.data.shards.files import Shards
from digseg_jax.data.shards.records import decode_label, encode_label, narrow_type
from digseg_jax.errors import UserError
from digseg_jax.io.storage import as_path, explained

FORMAT = 1
MANIFEST = "latents.json"
ABSENT = "absent.npy"
ORIENTATIONS = 2  # records an example: as it is, mirrored
MODE = "--mode=cache_latents"
_LENGTH = 4  # bytes of the header's length
_STORED = np.dtype("<f4")
# what a cache depends on, by key of its manifest, in the words of the user
MADE_WITH = {
    "image_size": "config.data.image_size",
    "codec": "config.segmentation.codec",
    "class_hash": "the class list",
    "vae": "the autoencoder's weights (config.model.vae)",
    "dtype": "config.model.dtype",
    "palette": "the colours of the palette",
}


class Stored(NamedTuple):
    """A record: label [s, s] with ignore = -1, latent [h, w, c] of the picture, masks' latents.

    classes: what masks[k], [h, w, c], shows; empty for a palette, whose one mask shows all.
    """

    label: Int[np.ndarray, "s s"]
    picture: Float[np.ndarray, "h w c"]
    classes: tuple[int, ...]
    masks: Float[np.ndarray, "k h w c"]


def encode_record(
    name: str, label: np.ndarray, classes: Sequence[int], latents: Float[np.ndarray, "n h w c"]
) -> bytes:
    """One orientation of an example as bytes; latents: the picture's, then the masks'."""
    png = encode_label(label)
    header = {
        "name": name,
        "label": len(png),
        "size": list(label.shape),
        "classes": [int(c) for c in classes],
        "latents": list(latents.shape),
    }
    text = json.dumps(header, ensure_ascii=False).encode()
    values = np.ascontiguousarray(latents, _STORED).tobytes()
    return len(text).to_bytes(_LENGTH, "little") + text + png + values


def decode_record(data: bytes, where: Callable[[], str], dtype: type = np.int32) -> Stored:
    """dtype: signed, of the label; large enough for every id.

    Raises:
      UnreadableError: what lies at `where()` is not a record of ours, or damaged.
    """
    try:
        end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
        header = json.loads(data[_LENGTH:end])
        middle = end + header["label"]
        label = decode_label(np.frombuffer(data, np.uint8, header["label"], end), dtype)
        latents = np.frombuffer(data, _STORED, offset=middle).reshape(header["latents"])
        classes, size = tuple(header["classes"]), tuple(header["size"])
    except (ValueError, KeyError, TypeError, cv2.error) as error:
        raise UnreadableError(f"{where()}: not a record of cached latents") from error
    if label is None or label.shape != size:
        raise UnreadableError(f"{where()}: damaged record {header['name']!r}")
    return Stored(label, latents[0], classes, latents[1:])


def cache_folders(cache: str, parts: Sequence[tuple[PartConfig, DatasetSpec, str]]) -> list[epath.Path]:
    """CACHE/NAME/SPLIT for each data set; a second one of that name and split is NAME-2.

    parts: as `sources.training_parts` gives them.

    Raises:
      UserError: a place that is neither a folder nor gs://.
    """
    root, seen = epath.Path(as_path(cache)).expanduser(), Counter()
    folders = []
    for part, _, split in parts:
        name = part.name.replace(":", "_")
        seen[name, split] += 1
        number = seen[name, split]
        folders.append(root / (name if number == 1 else f"{name}-{number}") / split)
    return folders


def read_manifest(folder: epath.Path) -> dict[str, Any]:
    """The manifest of a finished cache.

    Raises:
      UserError: there is none, it is not finished, or it is of another format.
    """
    path = folder / MANIFEST
    with explained(path, "cannot be read"):
        if not path.exists():
            raise UserError(_unfinished(folder))
        text = path.read_text()
    try:
        manifest = json.loads(text)
        if manifest["format"] != FORMAT:
            raise UserError(f"{path}: format {manifest['format']!r}; this version reads {FORMAT}")
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the manifest of cached latents; make it with {MODE}") from error
    return manifest


def _unfinished(folder: epath.Path) -> str:
    plan = folder / files.PLAN
    if not plan.exists():
        return f"{folder}: no cached latents here; {MODE} makes them"
    facts = json.loads(plan.read_text())
    shards = -(-facts["source_examples"] // facts["shard_examples"])
    left = len(files.missing(folder, shards))
    return f"{folder}: not finished, {left} of {shards} shards are missing; {MODE} goes on with it"


def require(folder: epath.Path, manifest: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Compares what a cache was made with to what a run has; keys as in MADE_WITH.

    Raises:
      UserError: the first difference, with the legal value.
    """
    for key, value in expected.items():
        found = manifest.get(key)
        if found == value:
            continue
        found, value = (f" {v}" if isinstance(v, str | int) else "" for v in (found, value))
        raise UserError(
            f"config.data.latent_cache: {folder} was made with another value of {MADE_WITH[key]}: "
            f"legal is the cache's{found}, this run has{value or ' another'}; or make a cache for this "
            f"run in another folder with {MODE}"
        )


class LatentSource:
    """Random access to the examples of a finished cache, in either orientation; labels are narrow.

    made_with: keys of MADE_WITH and the values that this run has.

    Raises:
      UserError: not finished, made with something else, or a shard that is missing or damaged.
    """

    def __init__(self, folder: epath.Path, made_with: Mapping[str, Any]):
        self.folder, self.manifest = folder, read_manifest(folder)
        require(folder, self.manifest, made_with)
        rows = self.manifest["shards"]
        self.records = Shards(folder, rows, [ORIENTATIONS * row["examples"] for row in rows])
        self.label_dtype = narrow_type(self.statistics().num_classes)
        self.absent = self._absent() if self.manifest["codec"] == "binary" else None

    def _absent(self) -> Float[np.ndarray, "h w c"]:
        path = self.folder / ABSENT
        with explained(path, "cannot be read"):
            data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.manifest["absent_sha256"]:
            raise UserError(f"{path}: not the file that {MANIFEST} names; make the cache again")
        return np.load(io.BytesIO(data), allow_pickle=False)

    def __len__(self) -> int:
        return self.manifest["examples"]

    def statistics(self) -> ClassStatistics:
        """Of the crops, all of them."""
        return ClassStatistics.from_dict(self.manifest["statistics"])

    def read(self, index: int, mirrored: bool) -> Stored:
        """Raises UnreadableError: a damaged record, with its place."""
        record = ORIENTATIONS * int(index) + int(mirrored)
        where = partial(self.records.where, record)
        return decode_record(self.records[record], where, self.label_dtype)

    def masks(self, stored: Stored, classes: Sequence[int]) -> Float[np.ndarray, "q h w c"]:
        """The latents of the queried classes' masks; with a palette, of its one picture."""
        if self.absent is None:
            return stored.masks
        place = {c: k for k, c in enumerate(stored.classes)}
        return np.stack(
            [stored.masks[place[c]] if c in place else self.absent for c in map(int, classes)]
        )
