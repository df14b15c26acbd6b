# SPDX-License-Identifier: Apache-2.0
"""Decoding of image and label files: they become arrays here, or an error that names the file.

Downloads are not trusted: a file's size and an image's dimensions are checked before anything is
decoded, only the formats that data sets use are opened, and a PNG label must match its checksums.
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

MAX_PIXELS = 80_000_000  # about three times the largest image of any data set here
MAX_BYTES = 512 * 2**20
IMAGE_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")
LABEL_FORMATS = ("PNG", "TIFF", "BMP")  # lossless ones: a class id must survive
# Pillow's modes of one channel; "P" holds palette indices, "I" 16 or 32 bits.
_INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")
_ORIENTATION = 0x0112  # the EXIF tag
# EXIF orientation -> the transposition that shows the image upright; 1 needs none.
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
    """A label that differs from its image in size."""


class LabelValueError(UserError):
    """A label value that has no meaning in its data set."""


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Reads a file of at most `limit` bytes.

    Raises:
      UnreadableError: missing, empty, or too large.
    """
    try:
        # size first: a huge file must not be read into memory
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
    """A decoded image as stored, and the EXIF orientation in which it is meant to be seen."""

    pixels: np.ndarray  # uint8 [h, w, 3]
    orientation: int = 1

    def upright(self) -> np.ndarray:
        """uint8 [h, w, 3], turned as EXIF says; unknown orientations count as upright."""
        if self.orientation not in _TURNS:
            return self.pixels
        return np.asarray(Image.fromarray(self.pixels).transpose(_TURNS[self.orientation]))


def read_picture(path: Path) -> Picture:
    """Reads an image of any color mode as RGB; 16-bit gray is scaled to 8 bits.

    Raises:
      UnreadableError: not an image, damaged, too many pixels, or of floating-point values.
    """
    image = _decode(path, read_bytes(path), IMAGE_FORMATS)
    orientation = _orientation(image)
    if image.mode == "F":
        raise UnreadableError(f"{path}: floating-point values; an image needs 8 or 16 bits")
    if image.mode.startswith("I"):
        # Pillow's own conversion of 16 bits clips at 255: take the upper 8 bits instead.
        grey = (np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8).astype(np.uint8)
        return Picture(np.repeat(grey[..., None], 3, axis=-1), orientation)
    return Picture(np.array(image if image.mode == "RGB" else image.convert("RGB")), orientation)


def read_index_image(path: Path) -> np.ndarray:
    """Reads class indices [h, w], uint8 or wider, from a one-channel or palette file.

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
    """Reads the gray values, uint8 [h, w], of a label in any 8-bit mode; palette entries are looked up.

    Raises:
      UnreadableError: also for a label with colors or more than 8 bits.
    """
    image = _decode_label(path)
    if image.mode.startswith(("I", "F")):
        raise UnreadableError(f"{path}: mode {image.mode}; this label has 8 bits")

    # Through RGB, so that a palette or an alpha channel does not matter; gray means equal channels.
    rgb = np.asarray(image.convert("RGB"))
    if (rgb != rgb[..., :1]).any():
        raise UnreadableError(f"{path}: holds colours; this label is grey")
    return rgb[..., 0]


def read_color_label(path: Path) -> np.ndarray:
    """Reads a label whose colors are codes: uint8 [h, w, 3].

    Raises:
      UnreadableError: also for a file that is not RGB.
    """
    image = _decode_label(path)
    if image.mode not in ("RGB", "RGBA"):
        raise UnreadableError(f"{path}: mode {image.mode}; this label is coded in RGB")
    return np.asarray(image)[..., :3]


class LabelTable:
    """Lookup table from label values to ids 0..n-1, or -1 for ignored ones; unknown values raise.

    Args:
      classes: for each id the values that mean it.
      ignored: values that become -1.
      what: name of the data set, for messages.
    """

    UNKNOWN = -2

    def __init__(self, classes: Iterable[Iterable[int]], ignored: Iterable[int], what: str):
        pairs = [(value, i) for i, values in enumerate(classes) for value in values]
        pairs += [(value, IGNORE) for value in ignored]

        # A dense table: label values have at most 16 bits.
        self.what = what
        self.lookup = np.full(max(v for v, _ in pairs) + 1, self.UNKNOWN, np.int32)
        for value, class_id in pairs:
            self.lookup[value] = class_id

    @classmethod
    def of(cls, spec: DatasetSpec) -> LabelTable:
        """Table of a data set's official label values."""
        return cls([c.raw for c in spec.classes], spec.ignored_raw, spec.name)

    def __call__(self, raw: np.ndarray, path: Path) -> np.ndarray:
        """Ids, int32 [h, w], of the values of a label file.

        Raises:
          LabelValueError: names the file, the value and where it first occurs.
        """
        outside = (raw < 0) | (raw >= len(self.lookup))
        label = self.lookup[np.where(outside, 0, raw)] if outside.any() else self.lookup[raw]

        # Name the first unknown pixel: a wrong file, a lossy copy or
        # another release of the data set.
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
        """The known values as ranges, "0..18, 255"."""
        values = np.flatnonzero(self.lookup != self.UNKNOWN)
        runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
        return ", ".join(f"{r[0]}..{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)


def check_size(path: Path, label: np.ndarray, image: np.ndarray) -> None:
    """Checks that label [h, w] and image [h, w, 3] have the same size.

    Raises:
      SizeError: names the label file and both sizes.
    """
    if label.shape != image.shape[:2]:
        (h, w), (ih, iw) = label.shape, image.shape[:2]
        raise SizeError(f"{path}: the label is {w}x{h} (width x height), its image {iw}x{ih}")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 if there is none."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata of a sound image count as none
        return 1


def _decode_label(path: Path) -> Image.Image:
    """Opens a label file; a PNG's checksums are compared first."""
    data = read_bytes(path)
    if data.startswith(b"\x89PNG"):
        _check_png(path, data)
    return _decode(path, data, LABEL_FORMATS)


def _decode(path: Path, data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """Decodes a file of one of the formats after a look at its dimensions.

    Raises:
      UnreadableError: another format, damaged, or more than MAX_PIXELS.
    """
    # Both limits on pixels, Pillow's and this module's, apply before decoding.
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
        # `open` reads the header only, so the size is known before any pixel is decoded.
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
    """Checks that every chunk of a PNG is complete and matches its checksum.

    A flipped bit would be another class, and Pillow skips the checksums of the pixel data.

    Raises:
      UnreadableError: the file ends early, or a checksum differs.
    """
    # A chunk: length (4 bytes), kind (4), data, CRC-32 of kind and data
    # (4); 8 bytes of signature first.
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
