# SPDX-License-Identifier: Apache-2.0
"""The file boundary: image and label files become arrays here, or an error that names the file.

Downloads are not to be trusted: a file's size and an image's dimensions are looked at before anything
is decoded, only the formats that data sets use are opened, and a PNG label must match its checksums.
"""

from __future__ import annotations

import dataclasses
import io
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from digseg_jax.data.datasets.spec import IGNORE, DatasetSpec
from digseg_jax.errors import UserError

MAX_PIXELS = 80_000_000  # the largest image of any data set here has about a third of it
MAX_BYTES = 512 * 2**20
IMAGE_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")
LABEL_FORMATS = ("PNG", "TIFF", "BMP")  # lossless ones
_INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableError(UserError):
    """A file that is missing, damaged, too large or of the wrong kind."""


class SizeError(UserError):
    """A label whose size is not its image's."""


class LabelValueError(UserError):
    """A label value that means nothing in its data set."""


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Raises UnreadableError: missing, empty, or larger than `limit` bytes."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise UnreadableError(f"{path}: {size} bytes, more than the {limit} that are read")
        data = path.read_bytes()
    except OSError as error:
        raise UnreadableError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not data:
        raise UnreadableError(f"{path}: the file is empty")
    return data


@dataclasses.dataclass(frozen=True)
class Picture:
    """A decoded image as stored, and how EXIF says it is to be turned for looking at it."""

    pixels: np.ndarray  # uint8 [h, w, 3]
    orientation: int = 1

    def upright(self) -> np.ndarray:
        """uint8 [h, w, 3], turned as EXIF says."""
        if self.orientation not in _TURNS:
            return self.pixels
        return np.asarray(Image.fromarray(self.pixels).transpose(_TURNS[self.orientation]))


def read_picture(path: Path) -> Picture:
    """Any colour mode as RGB; 16-bit grey is scaled to 8 bits.

    Raises:
      UnreadableError: not an image, damaged, too many pixels, or of floating-point values.
    """
    image = _decode(path, read_bytes(path), IMAGE_FORMATS)
    orientation = _orientation(image)
    if image.mode == "F":
        raise UnreadableError(f"{path}: floating-point values; an image needs 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = (np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8).astype(np.uint8)
        return Picture(np.repeat(grey[..., None], 3, axis=-1), orientation)
    return Picture(np.array(image if image.mode == "RGB" else image.convert("RGB")), orientation)


def read_index_image(path: Path) -> np.ndarray:
    """Class indices [h, w] of a one-channel file, uint8 or wider; of a palette file the indices.

    Raises:
      UnreadableError: also for more than one channel: `convert("L")` would invent values.
    """
    image = _decode_label(path)
    if image.mode not in _INDEX_MODES:
        raise UnreadableError(
            f"{path}: mode {image.mode}; a label has one channel of class indices (or a palette)"
        )
    raw = np.asarray(image)
    return raw.astype(np.uint8) if raw.dtype == bool else raw


def read_grey_label(path: Path) -> np.ndarray:
    """uint8 [h, w] grey values of a label in any 8-bit mode; a palette is looked up.

    Raises:
      UnreadableError: also for colours.
    """
    image = _decode_label(path)
    if image.mode.startswith(("I", "F")):
        raise UnreadableError(f"{path}: mode {image.mode}; this label has 8 bits")
    rgb = np.asarray(image.convert("RGB"))
    if (rgb != rgb[..., :1]).any():
        raise UnreadableError(f"{path}: holds colours; this label is grey")
    return rgb[..., 0]


def read_color_label(path: Path) -> np.ndarray:
    """uint8 [h, w, 3] of a label whose colours are codes.

    Raises:
      UnreadableError: also for a file that is not RGB.
    """
    image = _decode_label(path)
    if image.mode not in ("RGB", "RGBA"):
        raise UnreadableError(f"{path}: mode {image.mode}; this label is coded in RGB")
    return np.asarray(image)[..., :3]


class LabelTable:
    """From the values of a label file to ids 0..n-1 and -1, by table; unknown values raise."""

    UNKNOWN = -2

    def __init__(self, classes: Iterable[Iterable[int]], ignored: Iterable[int], what: str):
        pairs = [(value, i) for i, values in enumerate(classes) for value in values]
        pairs += [(value, IGNORE) for value in ignored]
        self.what = what
        self.lookup = np.full(max(v for v, _ in pairs) + 1, self.UNKNOWN, np.int32)
        for value, class_id in pairs:
            self.lookup[value] = class_id

    @classmethod
    def of(cls, spec: DatasetSpec) -> LabelTable:
        return cls([c.raw for c in spec.classes], spec.ignored_raw, spec.name)

    def __call__(self, raw: np.ndarray, path: Path) -> np.ndarray:
        """int32 [h, w].

        Raises:
          LabelValueError: names the file, the value and where it first occurs.
        """
        outside = (raw < 0) | (raw >= len(self.lookup))
        label = self.lookup[np.where(outside, 0, raw)] if outside.any() else self.lookup[raw]
        unknown = outside | (label == self.UNKNOWN)
        if unknown.any():
            y, x = np.argwhere(unknown)[0]
            count = len(np.unique(raw[unknown]))
            more = f" ({count - 1} other unknown values)" if count > 1 else ""
            raise LabelValueError(
                f"{path}: label value {raw[y, x]} at row {y}, column {x} is no class of "
                f"{self.what}{more}; legal: {self._legal()}"
            )
        return label

    def _legal(self) -> str:
        values = np.flatnonzero(self.lookup != self.UNKNOWN)
        runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
        return ", ".join(f"{r[0]}..{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)


def check_size(path: Path, label: np.ndarray, image: np.ndarray) -> None:
    """Raises SizeError unless both have the same height and width."""
    if label.shape != image.shape[:2]:
        (h, w), (ih, iw) = label.shape, image.shape[:2]
        raise SizeError(f"{path}: the label is {w}x{h} (width x height), its image {iw}x{ih}")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata of an image that decodes: as if it had none
        return 1


def _decode_label(path: Path) -> Image.Image:
    data = read_bytes(path)
    if data.startswith(b"\x89PNG"):
        _check_png(path, data)
    return _decode(path, data, LABEL_FORMATS)


def _decode(path: Path, data: bytes, formats: tuple[str, ...]) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
        width, height = image.size
        if width * height <= MAX_PIXELS:
            image.load()
    except Image.DecompressionBombError as error:
        raise UnreadableError(f"{path}: {error}") from error
    except Exception as error:  # a damaged file can raise anything from inside its decoder
        kinds = ", ".join(formats)
        reason = " ".join(str(error).split())
        raise UnreadableError(f"{path}: cannot be decoded ({kinds}): {reason}") from error
    if width * height > MAX_PIXELS:
        raise UnreadableError(f"{path}: {width}x{height} pixels, more than {MAX_PIXELS} in all")
    return image


def _check_png(path: Path, data: bytes) -> None:
    """Every chunk whole and as its checksum says: a flipped bit would be another class."""
    position, kind = 8, b""
    while kind != b"IEND":
        length, kind = int.from_bytes(data[position : position + 4], "big"), data[position + 4 :][:4]
        end = position + 12 + length
        if end > len(data):
            raise UnreadableError(f"{path}: the PNG file ends early")
        stored = int.from_bytes(data[end - 4 : end], "big")
        if zlib.crc32(data[position + 4 : end - 4]) != stored:
            raise UnreadableError(f"{path}: the PNG file is damaged (checksum of {kind!r})")
        position = end
