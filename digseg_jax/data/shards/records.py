# SPDX-License-Identifier: Apache-2.0
"""Prepared data sets: ArrayRecord shards, and a manifest that describes them.

    OUT/SPLIT/manifest.json                      counts, checksums, class list, class statistics
    OUT/SPLIT/shard-00000-of-00012.array_record  one record per example

A record is its header's length (uint32, little endian), the header (JSON), the image and the label. The
image is the JPEG of the download, byte for byte, or a PNG where the source's image differs from the
content of its file; the label is a PNG of ids with the largest value for ignored pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from etils import epath

from digseg_jax.config.templates import check_template
from digseg_jax.data.datasets.spec import IGNORE, ClassInfo, DatasetSpec
from digseg_jax.data.datasets.statistics import ClassStatistics
from digseg_jax.data.shards.files import Shards, checksum
from digseg_jax.errors import UserError
from digseg_jax.io.files import UnreadableError
from digseg_jax.io.image_file import StoredImage, check_dimensions
from digseg_jax.io.json_file import check_keys, parse_object, read_json
from digseg_jax.io.storage import as_path, inside

FORMAT = 1
MANIFEST = "manifest.json"
VALUES = "values of the classes"
REMEDY = "run digseg_jax.tools.prepare_data"
_ENTRIES = {
    "split": str, "class_hash": str, "examples": int, "shards": list, "spec": dict, "statistics": dict,
}  # fmt: skip
_FACTS = ("name", "title", "ignore", "license", "template", "train_split", "eval_split")
_LENGTH = 4  # bytes of the header's length
# Labels are written once and decoded in every epoch. The highest level decodes in 75 % of the time of
# the default one; without PNG filters ids compress as well and decode in 60 % of the time (older
# versions of OpenCV offer no choice of filter).
_LABEL_LEVEL = 9
_NO_FILTER = [cv2.IMWRITE_PNG_FILTER, 8] if hasattr(cv2, "IMWRITE_PNG_FILTER") else []
# The header says how to turn an image: OpenCV must not apply EXIF's orientation by itself.
_AS_STORED = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION


def class_hash(spec: DatasetSpec) -> str:
    """Identifier of a class list (16 hex digits): names in their order, and ids that masks cover."""
    rows = [[c.name, list(spec.covers(i))] for i, c in enumerate(spec.classes)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def values_of(spec: DatasetSpec) -> list[list[int]]:
    """Values of each class in the files of labels, then those that are ignored; JSON-ready."""
    return [*(list(c.raw) for c in spec.classes), list(spec.ignored_raw)]


def has_classes_of(manifest: dict[str, Any], spec: DatasetSpec) -> bool:
    """Whether shards were made with this list of classes; an older manifest lacks the values.

    A user's own list is read from the shards, so its synonyms count too.
    """
    same_values = manifest.get(VALUES) in (None, values_of(spec))
    words = facts_of(spec)["classes"]
    same_words = spec.name != "folder" or manifest["spec"]["classes"] == words
    return manifest["class_hash"] == class_hash(spec) and same_values and same_words


def facts_of(spec: DatasetSpec) -> dict[str, Any]:
    """Entries of the data set's spec for its manifest, JSON-ready."""
    classes = [[c.name, list(c.synonyms), list(c.covers)] for c in spec.classes]
    return {key: getattr(spec, key) for key in _FACTS} | {"classes": classes}


def stored_spec(root: str | Path) -> DatasetSpec | None:
    """Spec of a user's own folder, from its shards; None if there are no shards in `root`.

    Raises:
      UserError: a manifest that cannot be read, or an illegal template in it.
    """
    manifests = [read_manifest(path.parent) for path in _manifests(root)]
    if not manifests:
        return None

    # All splits were made from one class list; the first manifest speaks for them.
    stored = manifests[0]["spec"]
    stored = {"license": stored.get("licence", "")} | stored  # as earlier versions spelled it
    facts = {key: stored[key] for key in _FACTS}
    check_template(facts["template"], f"{root}: the template of {MANIFEST}")
    classes = tuple(ClassInfo(n, tuple(s), covers=tuple(c)) for n, s, c in stored["classes"])
    splits = dict.fromkeys((m["split"] for m in manifests), 0)  # only the user knows how many
    return DatasetSpec(classes=classes, splits=splits, **facts)


def encode_record(image: np.ndarray, label: np.ndarray, name: str, jpeg: bytes | None) -> bytes:
    """Encodes one example as bytes.

    Args:
      image: uint8 [h, w, 3], RGB, as the reader gives it.
      label: int32 [h, w], ignore = -1.
      name: the example's name.
      jpeg: content of the image's file, if it is one. It is stored if decoding it, as stored or in one
        of EXIF's turns, gives exactly `image`; otherwise the image is stored as PNG.
    """
    turn, stored = _kept(image, jpeg) if jpeg else (1, None)
    if stored is None:
        # OpenCV expects BGR. A middle level: lossless images are large, and the highest takes long.
        stored = _png(np.ascontiguousarray(image[..., ::-1]), level=3)

    # The header holds the sizes that separate image and label, and the label's shape as a check.
    label_png = encode_label(label)
    header = {
        "name": name,
        "image": len(stored),
        "shape": list(label.shape),
        "orientation": turn,
    }
    text = json.dumps(header, ensure_ascii=False).encode()
    return len(text).to_bytes(_LENGTH, "little") + text + stored + label_png


def _kept(image: np.ndarray, jpeg: bytes) -> tuple[int, bytes | None]:
    """(EXIF orientation, `jpeg`) if it decodes to exactly `image`; (1, None) otherwise."""
    decoded = _decode_image(jpeg)
    if decoded is None:
        return 1, None

    # The reader may have turned the image or left it: try all turns instead of trusting EXIF.
    for turn in range(1, 9):
        if np.array_equal(StoredImage(decoded, turn).upright(), image):
            return turn, jpeg
    return 1, None


def _png(value: np.ndarray, level: int, filters: Sequence[int] = ()) -> bytes:
    """PNG bytes of an array, at a zlib level from 0 to 9."""
    options = [cv2.IMWRITE_PNG_COMPRESSION, level, *filters]
    return cv2.imencode(".png", value, options)[1].tobytes()


def encode_label(label: np.ndarray) -> bytes:
    """Encodes a label, int32 [h, w] with ignore = -1, as PNG.

    The PNG has 8 bits if that leaves 255 free for ignored pixels, otherwise 16 with 65535 for them.
    """
    dtype = np.uint8 if label.max(initial=IGNORE) < 255 else np.uint16
    narrow = np.where(label == IGNORE, np.iinfo(dtype).max, label).astype(dtype)
    return _png(narrow, level=_LABEL_LEVEL, filters=_NO_FILTER)


def decode_label(data: np.ndarray, dtype: type[np.signedinteger[Any]] = np.int32) -> np.ndarray | None:
    """Decodes the bytes (uint8 [n]) of `encode_label` to a label [h, w]; None if they are damaged.

    dtype: signed type, wide enough for every id.

    Raises:
      ValueError: no bytes, no image, or one of more pixels than are read.
      cv2.error: OpenCV refuses them.
    """
    check_dimensions(data.tobytes())
    raw: np.ndarray | None = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
    if raw is None:
        return None

    # The largest unsigned value means ignored. Read as a signed number of the same width it is -1
    # already, without a copy.
    if np.dtype(dtype).itemsize == raw.itemsize:
        return raw.view(dtype)
    label = raw.astype(dtype)
    label[raw == np.iinfo(raw.dtype).max] = IGNORE
    return label


def narrow_type(num_classes: int) -> type[np.signedinteger[Any]]:
    """Narrowest signed type for labels of `num_classes` classes and -1.

    Training crops use it: half of their time besides decoding is memory traffic.
    """
    return np.int8 if num_classes <= np.iinfo(np.int8).max else np.int16


def _decode_image(data: bytes | memoryview) -> np.ndarray | None:
    """Decodes an image to uint8 [h, w, 3], RGB, not turned; None if OpenCV cannot read it."""
    try:
        check_dimensions(data)
        return cv2.imdecode(np.frombuffer(data, np.uint8), _AS_STORED)
    except (cv2.error, ValueError):
        return None


def decode_record(
    data: bytes, where: Callable[[], str], dtype: type[np.signedinteger[Any]] = np.int32
) -> dict[str, Any]:
    """Decodes a record: {"image" uint8 [h, w, 3], "label" [h, w], "name"}.

    Args:
      where: names the record for messages; only called on errors.
      dtype: signed type of the label, wide enough for every id.

    Raises:
      UnreadableError: `where()` holds no record of a prepared data set, or a damaged one.
    """
    try:
        # length | header | image | label; a damaged record may fail at any of these
        end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
        header = parse_object(data[_LENGTH:end])
        middle = end + header["image"]
        image = _decode_image(memoryview(data)[end:middle])
        label = decode_label(np.frombuffer(data, np.uint8, offset=middle), dtype)
        shape = tuple(header["shape"])
    except (ValueError, KeyError, TypeError, cv2.error) as error:
        raise UnreadableError(f"{where()}: not a record of a prepared data set") from error

    # OpenCV returns None for damaged bytes instead of raising.
    if image is None or label is None or label.shape != shape:
        raise UnreadableError(f"{where()}: damaged record {header['name']!r}")

    # Images are stored unturned, to keep the JPEG's bytes; labels always lie on the upright image.
    if header["orientation"] != 1:
        image = StoredImage(image, header["orientation"]).upright()
    return {"image": image, "label": label, "name": header["name"]}


def read_manifest(folder: Any, spec: DatasetSpec | None = None) -> dict[str, Any]:
    """Reads the manifest of a prepared split.

    Raises:
      UserError: missing, of another format, or made with another class list than `spec`'s.
    """
    path = epath.Path(folder) / MANIFEST
    if not path.exists():
        raise UserError(f"{path}: no readable manifest; {REMEDY}")
    manifest = read_json(path, {"format": int}, f"no readable manifest; {REMEDY}")
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path}: format {manifest.get('format')!r}; this version reads {FORMAT}")
    check_manifest(path, manifest)

    # Ids are numbers only: shards of an older class list would be read with shifted names.
    if spec is not None and manifest["class_hash"] != class_hash(spec):
        raise UserError(
            f"{path}: made with another class list than {spec.name}'s "
            f"({manifest['class_hash']}, now {class_hash(spec)}): prepare it again"
        )
    return manifest


def check_manifest(path: epath.Path, manifest: dict[str, Any]) -> None:
    """Raises UserError for a manifest with other types of entries than `prepare_split` writes."""
    try:
        check_keys(manifest, _ENTRIES)
        check_keys(
            manifest["spec"], dict.fromkeys(("name", "title", "ignore"), str) | {"classes": list}
        )
        for name, synonyms, covers in manifest["spec"]["classes"]:
            if not (isinstance(name, str) and isinstance(synonyms, list) and isinstance(covers, list)):
                raise ValueError(f"{name!r} is not a class with its synonyms")
        for row in manifest["shards"]:
            check_keys(row, {"file": str, "bytes": int, "sha256": str, "examples": int})

        # Fails where the counts are not those of one class list.
        ClassStatistics.from_dict(manifest["statistics"])
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise UserError(f"{path}: not a manifest of shards ({error}); {REMEDY}") from error


def prepared_splits(root: str | Path) -> list[str]:
    """Names of the splits whose shards are in `root`, sorted."""
    return sorted(path.parent.name for path in _manifests(root))


def _manifests(root: str | Path) -> list[epath.Path]:
    """Paths of all manifests in `root`, sorted."""
    if not str(root):
        return []
    folder = epath.Path(as_path(root))
    return sorted(folder.glob(f"*/{MANIFEST}")) if folder.exists() else []


def is_prepared(root: str | Path, split: str) -> bool:
    """True if `root` holds shards of the split; `root` may be gs://..."""
    return bool(str(root)) and (epath.Path(as_path(root)) / split / MANIFEST).exists()


class RecordSource:
    """Random access to the examples of a split's shards; opening it reads only the manifest.

    narrow: labels have `narrow_type` instead of int32.

    Raises:
      UserError: manifest and shards disagree (a missing shard, or one of another size).
    """

    image_is_file = False  # a shard holds many

    def __init__(self, root: str | Path, split: str, spec: DatasetSpec, *, narrow: bool = False):
        self.folder = epath.Path(as_path(root)) / split
        self.label_dtype = narrow_type(spec.num_classes) if narrow else np.int32
        self.manifest = read_manifest(self.folder, spec)
        self.shards: Sequence[dict[str, Any]] = self.manifest["shards"]
        self.records = Shards(self.folder, self.shards, [s["examples"] for s in self.shards])

    def statistics(self) -> ClassStatistics:
        """Class statistics of the split, counted when it was prepared."""
        return ClassStatistics.from_dict(self.manifest["statistics"])

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Decodes one example.

        Raises:
          UnreadableError: a damaged shard or record; names its place.
        """
        where = partial(self.records.where, index)
        return decode_record(self.records[index], where, self.label_dtype)

    def files(self, index: int) -> dict[str, Path]:
        """The shard that holds both image and label."""
        path = self.records.file(index)
        return {"image": path, "label": path}


def verify(root: str | Path, split: str) -> list[str]:
    """Reads every byte of a split's shards; returns one line per difference from the manifest."""
    folder = epath.Path(as_path(root)) / split
    wrong = []
    for shard in read_manifest(folder)["shards"]:
        path = inside(folder, shard["file"])
        if not path.exists():
            wrong.append(f"{path}: missing")
        elif (found := checksum(path)) != shard["sha256"]:
            wrong.append(f"{path}: checksum {found}, the manifest says {shard['sha256']}")
    return wrong
