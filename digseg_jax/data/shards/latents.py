# SPDX-License-Identifier: Apache-2.0
"""Cached latents: ArrayRecord shards of the frozen autoencoder's output on a training split.

    CACHE/NAME/SPLIT/latents.json   counts, sizes, checksums, class statistics, settings (MADE_WITH)
    CACHE/NAME/SPLIT/absent.npy     the latent of an empty mask (one mask per class)
    CACHE/NAME/SPLIT/shard-...      two records per example: as it is, then mirrored

A record is its header's length (uint32, little endian), the header (JSON), the label crop (a PNG as in
`records`) and the latents, float32 [1 + masks, h, w, c]: first the image's, then one per mask: the mask
of each class that the crop shows, or the one of all classes where the codec paints them together.
Mirrored crops are encoded too: the mirror of a latent is not the latent of the mirror.

Latents are stored as the float32 that the autoencoder gives, so that training from them is the same up
to rounding: at 512 pixels 64 KB each, 128 KB x (1 + classes shown) per example.
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
from digseg_jax.data.datasets.spec import DatasetSpec
from digseg_jax.data.datasets.statistics import ClassStatistics
from digseg_jax.data.shards import files
from digseg_jax.data.shards.files import Shards
from digseg_jax.data.shards.records import decode_label, encode_label, narrow_type
from digseg_jax.errors import UserError
from digseg_jax.io.files import UnreadableError
from digseg_jax.io.json_file import check_keys, parse_object, read_json
from digseg_jax.io.storage import as_path, explained

FORMAT = 1
MANIFEST = "latents.json"
ABSENT = "absent.npy"
ORIENTATIONS = 2  # records per example: as it is, mirrored
MODE = "--mode=cache_latents"
_LENGTH = 4  # bytes of the header's length
_STORED = np.dtype("<f4")  # type of stored latents: float32, little endian
# Everything that a cache depends on: key of its manifest -> name for the user.
MADE_WITH = {
    "image_size": "config.data.image_size",
    "codec": "config.model.codec",
    "class_hash": "the class list",
    "vae": "the autoencoder's weights (config.model.vae)",
    "dtype": "config.model.dtype",
    "codec_state": "what the codec chose (the colors of a palette)",
}


class Stored(NamedTuple):
    """One decoded record.

    Attributes:
      label: class ids [s, s], ignore = -1.
      image: the image's latent [h, w, c].
      classes: classes[k] is the class that masks[k] shows; empty where one mask shows all classes.
      masks: latents of the masks [k, h, w, c].
    """

    label: Int[np.ndarray, "s s"]
    image: Float[np.ndarray, "h w c"]
    classes: tuple[int, ...]
    masks: Float[np.ndarray, "k h w c"]


def encode_record(
    name: str, label: np.ndarray, classes: Sequence[int], latents: Float[np.ndarray, "n h w c"]
) -> bytes:
    """Encodes one orientation of an example as bytes.

    Args:
      name: the example's name.
      label: int32 [s, s], ignore = -1.
      classes: the class of each mask; empty if one mask shows all classes.
      latents: float32 [1 + masks, h, w, c], the image's first, then the masks' in this order.
    """
    # The header holds what separates label and latents again.
    png = encode_label(label)
    header = {
        "name": name,
        "label": len(png),
        "size": list(label.shape),
        "classes": [int(c) for c in classes],
        "latents": list(latents.shape),
    }

    # Little endian whatever the machine, so that a cache may be copied to another one.
    text = json.dumps(header, ensure_ascii=False).encode()
    values = np.ascontiguousarray(latents, _STORED).tobytes()
    return len(text).to_bytes(_LENGTH, "little") + text + png + values


def decode_record(data: bytes, where: Callable[[], str], dtype: type = np.int32) -> Stored:
    """Decodes a record of `encode_record`.

    Args:
      where: names the record for messages; only called on errors.
      dtype: signed type of the label, wide enough for every id.

    Raises:
      UnreadableError: `where()` holds no record of cached latents, or a damaged one.
    """
    try:
        # length | header | PNG | float32 values; a damaged record may fail at any of these
        end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
        header = parse_object(data[_LENGTH:end])
        middle = end + header["label"]
        label = decode_label(np.frombuffer(data, np.uint8, header["label"], end), dtype)
        latents = np.frombuffer(data, _STORED, offset=middle).reshape(header["latents"])
        classes, size = tuple(header["classes"]), tuple(header["size"])
    except (ValueError, KeyError, TypeError, cv2.error) as error:
        raise UnreadableError(f"{where()}: not a record of cached latents") from error

    # OpenCV returns None for a damaged PNG instead of raising.
    if label is None or label.shape != size:
        raise UnreadableError(f"{where()}: damaged record {header['name']!r}")
    return Stored(label, latents[0], classes, latents[1:])


def cache_folders(cache: str, parts: Sequence[tuple[PartConfig, DatasetSpec, str]]) -> list[epath.Path]:
    """Folder CACHE/NAME/SPLIT of each data set; a second one of the same name and split is NAME-2.

    parts: as returned by `sources.training_parts`.

    Raises:
      UserError: a path that is neither a folder nor gs://.
    """
    root = epath.Path(as_path(cache))
    seen = Counter[tuple[str, str]]()
    folders = []
    for part, _, split in parts:
        # A colon, as in "tfds:", is not legal in every file system.
        name = part.name.replace(":", "_")
        seen[name, split] += 1
        number = seen[name, split]
        folders.append(root / (name if number == 1 else f"{name}-{number}") / split)
    return folders


def read_manifest(folder: epath.Path) -> dict[str, Any]:
    """Reads the manifest of a finished cache.

    Raises:
      UserError: no manifest, an unfinished cache, or another format.
    """
    # The manifest is written last: without it the cache is not finished.
    path = folder / MANIFEST
    with explained(path, "cannot be read"):
        if not path.exists():
            raise UserError(_unfinished(folder))

    remedy = f"not the manifest of cached latents; make it with {MODE}"
    manifest = read_json(path, {"format": int}, remedy)
    if manifest["format"] != FORMAT:
        raise UserError(f"{path}: format {manifest['format']!r}; this version reads {FORMAT}")

    # Every entry that is read later, so that a damaged manifest fails here and in one line.
    try:
        check_keys(manifest, {"examples": int, "shards": list, "statistics": dict})
        for row in manifest["shards"]:
            check_keys(row, {"file": str, "bytes": int, "examples": int})
        ClassStatistics.from_dict(manifest["statistics"])
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise UserError(f"{path}: {remedy} ({error})") from error
    return manifest


def _unfinished(folder: epath.Path) -> str:
    """Message about a folder without a manifest: nothing there, or how much is missing."""
    plan = folder / files.PLAN
    if not plan.exists():
        return f"{folder}: no cached latents here; {MODE} makes them"

    # The number of shards follows from the plan; the last shard may be smaller.
    facts = read_json(plan, {"source_examples": int, "shard_examples": int})
    shards = -(-facts["source_examples"] // facts["shard_examples"])
    left = len(files.missing(folder, shards))
    return f"{folder}: not finished, {left} of {shards} shards are missing; {MODE} continues it"


def require(folder: epath.Path, manifest: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Checks that a cache was made with the settings of a run.

    Args:
      folder: the cache, for the message.
      manifest: the cache's settings.
      expected: keys of MADE_WITH and the run's values.

    Raises:
      UserError: the first difference, with the legal value.
    """
    for key, value in expected.items():
        found = manifest.get(key)
        if found == value:
            continue

        # Only short values are printed: palettes and digests of weights would say nothing to the user.
        found, value = (f" {v}" if isinstance(v, str | int) else "" for v in (found, value))
        raise UserError(
            f"config.data.latent_cache: {folder} was made with another value of {MADE_WITH[key]}: "
            f"legal is the cache's{found}, this run has{value or ' another'}; or make a cache for this "
            f"run in another folder with {MODE}"
        )


class LatentSource:
    """Random access to the examples of a finished cache, in either orientation; labels are narrow.

    made_with: keys of MADE_WITH and the run's values.

    Raises:
      UserError: an unfinished cache, one made with other settings, or a missing or damaged shard.
    """

    def __init__(self, folder: epath.Path, made_with: Mapping[str, Any]):
        self.folder, self.manifest = folder, read_manifest(folder)
        require(folder, self.manifest, made_with)

        # Record 2 i is example i as it is, record 2 i + 1 its mirror.
        rows = self.manifest["shards"]
        self.records = Shards(folder, rows, [ORIENTATIONS * row["examples"] for row in rows])
        self.label_dtype = narrow_type(self.statistics().num_classes)
        self.absent = self._absent() if "absent_sha256" in self.manifest else None

    def _absent(self) -> Float[np.ndarray, "h w c"]:
        """Latent of an empty mask, which all absent classes share; its file is checked by SHA-256."""
        path = self.folder / ABSENT
        with explained(path, "cannot be read"):
            data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.manifest["absent_sha256"]:
            raise UserError(f"{path}: not the file that {MANIFEST} names; make the cache again")
        return np.load(io.BytesIO(data), allow_pickle=False)

    def __len__(self) -> int:
        return self.manifest["examples"]

    def statistics(self) -> ClassStatistics:
        """Class statistics over all cached crops."""
        return ClassStatistics.from_dict(self.manifest["statistics"])

    def read(self, index: int, mirrored: bool) -> Stored:
        """Decodes one example in one orientation.

        Raises:
          UnreadableError: a damaged record; names its shard and place.
        """
        record = ORIENTATIONS * int(index) + int(mirrored)
        where = partial(self.records.where, record)
        return decode_record(self.records[record], where, self.label_dtype)

    def masks(
        self, stored: Stored, classes: Sequence[int] | np.ndarray
    ) -> Float[np.ndarray, "q h w c"]:
        """Latents of the queried classes' masks, or of the one that shows all classes."""
        if self.absent is None:
            return stored.masks

        # A class that the crop does not show has the latent of an empty mask.
        place = {c: k for k, c in enumerate(stored.classes)}
        return np.stack(
            [stored.masks[place[c]] if c in place else self.absent for c in map(int, classes)]
        )
