# SPDX-License-Identifier: Apache-2.0
"""Reads image files as RGB of 8 bits, by one rule for training, evaluation and prediction.

TIFFs that Pillow does not read are read by rasterio, if that is installed (see `georeference`).

Transparent pixels are laid over white. In files of more than 8 bits, whole numbers or floats, the
smallest value becomes 0 and the largest 255; if all values are equal, the upper 8 of 16 bits are taken.
Of several frames or pages the first one is read.

Files are not trusted: size and dimensions are checked before anything is decoded, and no format is
opened that runs a program (EPS) or reads other files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import re
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from digseg_jax.arraytypes import UInt8
from digseg_jax.io.files import LFS_POINTER, TooLargeError, UnreadableError, read_bytes, shown
from digseg_jax.io.georeference import INSTALL, has_rasterio, read_bands

MAX_PIXELS = 178_956_970  # Pillow rejects more, too
TILES = (
    "cut it into tiles and name their folder (gdal_retile.py -ps 8192 8192 -targetDir TILES FILE); "
    f"--mode=predict reads a TIFF by windows ({INSTALL})"
)
IMAGE_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP")
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp")
# Pillow warns from half of MAX_PIXELS on, which is legal here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# What it logs of a file that it cannot read is an error of this module, in one line.
logging.getLogger("PIL.TiffImagePlugin").disabled = True

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
# Beginnings of files, and brands of ISO containers, for a message.
_STARTS = {
    b"%PDF": "PDF",
    b"\x00\x00\x00\x0cjP": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\x89HDF": "HDF5",
    b"\x93NUMPY": "a NumPy array",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive, perhaps NIfTI",
    b"8BPS": "Photoshop",
    b"gimp xcf": "GIMP's XCF",
    b"\x00\x00\x00\x0cJXL": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"\x00\x00\x01\x00": "ICO",
    b"P5": "PGM",
    b"P6": "PPM",
    b"SIMPLE": "FITS",
    b"v/1\x01": "OpenEXR",
    b"#?RADIANCE": "Radiance HDR",
    b"\x1aE\xdf\xa3": "a video",
    b"\x5c\x01\x00\x00": "NIfTI",
    b"<svg": "SVG",
    b"<?xml": "XML",
    b"<": "a page of HTML",
    b"{": "JSON",
}
_BRANDS = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"avif": "AVIF"}
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the latter two of more than 4 GiB
_TIFF_BITS = 258  # the TIFF tag BitsPerSample


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """A decoded image as stored, and the EXIF orientation in which it is meant to be seen."""

    pixels: UInt8[np.ndarray, "h w 3"]
    orientation: int = 1

    def upright(self) -> UInt8[np.ndarray, "h w 3"]:
        """The pixels turned as EXIF says; unknown orientations count as upright."""
        if self.orientation not in _TURNS:
            return self.pixels
        return np.asarray(Image.fromarray(self.pixels).transpose(_TURNS[self.orientation]))


def read_image(path: Path) -> StoredImage:
    """Reads an image file of any color mode and depth as RGB; see the top of this module.

    Raises:
      UnreadableError: not an image, damaged, too many pixels, or without any number in it.
    """
    try:
        data = read_bytes(path)
    except TooLargeError as error:
        raise UnreadableError(f"{error}; {TILES}") from error
    try:
        image = decode(path, data, IMAGE_FORMATS)
    except UnreadableError as error:
        if (pixels := _raster_rgb(data)) is not None:
            return StoredImage(pixels)
        raster = data.startswith(_TIFF_STARTS) and not has_rasterio()
        hint = f"; rasters of more bands or other types: {INSTALL}" if raster else ""
        raise UnreadableError(f"{error}{hint}") from error
    orientation = orientation_of(image)

    try:
        return StoredImage(_deep_rgb(image, data, orientation), orientation)
    except (ValueError, OSError, cv2.error) as error:  # faults that the decoder did not see
        raise UnreadableError(f"{shown(path)}: cannot be decoded: {_reason(error)}") from error


def _raster_rgb(data: bytes) -> UInt8[np.ndarray, "h w 3"] | None:
    """RGB of a TIFF that Pillow does not read, such as 13 bands of 16 bits; None if rasterio cannot."""
    bands = read_bands(data, MAX_PIXELS) if data.startswith(_TIFF_STARTS) else None
    with contextlib.suppress(ValueError):  # no finite number in it
        return None if bands is None else _eight_bits(bands)
    return None


def to_rgb(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """Converts an open image of any Pillow mode to RGB, not turned; see the top of this module.

    Raises:
      ValueError: floats none of which is finite, or a mode that Pillow cannot convert.
    """
    # Modes of more than 8 bits have one channel.
    if image.mode == "F" or image.mode.startswith("I"):
        gray = _eight_bits(np.asarray(image))
        return np.repeat(gray[..., None], 3, axis=-1)

    # Alpha is a channel, or an entry of a palette ("transparency").
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)

    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def decode(path: Path, data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """Decodes a file of one of the formats, after checking its dimensions.

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
    except Image.DecompressionBombError as error:  # "Image size (N pixels) exceeds ..."
        found = re.search(r"\d+", str(error))
        raise _too_large(path, int(found[0]) if found else MAX_PIXELS + 1) from error
    except Image.UnidentifiedImageError as error:
        if data.startswith(LFS_POINTER):
            raise UnreadableError(
                f"{shown(path)}: a pointer of git-LFS; `git lfs pull` fetches the image itself"
            ) from error
        known = f", but {kind}: convert it" if (kind := _kind_of(data)) else ""
        raise UnreadableError(
            f"{shown(path)}: cannot be decoded, not one of {', '.join(formats)}{known}"
        ) from error
    except Exception as error:  # a damaged file can raise anything from inside its decoder
        kinds = ", ".join(formats)
        raise UnreadableError(
            f"{shown(path)}: cannot be decoded ({kinds}): {_reason(error)}"
        ) from error

    if width * height > MAX_PIXELS:
        raise _too_large(path, width * height)
    return image


def _too_large(path: Path, pixels: int) -> UnreadableError:
    """The error about an image of more than MAX_PIXELS."""
    most = f"{pixels:,} pixels, more than the {MAX_PIXELS:,} that are read at a time"
    return UnreadableError(f"{shown(path)}: {most}; {TILES}")


def _kind_of(data: bytes) -> str:
    """Name of a format that people have and this module does not read; empty if it is none of them."""
    if data[4:8] == b"ftyp":  # the container of these three, and of videos
        return _BRANDS.get(data[8:12], "a video or another file of its container")
    if data[128:132] == b"DICM":  # after a preamble of any content
        return "DICOM"
    starts = (data[:64], data[:64].lstrip())  # a page may begin with blank lines
    return next((k for start, k in _STARTS.items() if any(s.startswith(start) for s in starts)), "")


def dimensions_of(path: Path) -> tuple[int, int] | None:
    """Height and width by the head of an image file, as stored; None if it cannot be read."""
    try:
        if not path.is_file():  # a pipe would be waited for
            return None
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return image.height, image.width
    except Exception:  # reading all of it names the fault
        return None


def check_dimensions(data: bytes | memoryview) -> None:
    """Checks the header of a JPEG or PNG that another decoder than `decode` is going to read.

    Raises:
      ValueError: another format, damaged, or more than MAX_PIXELS.
    """
    try:
        width, height = Image.open(io.BytesIO(data), formats=("JPEG", "PNG")).size
    except Exception as error:  # a damaged file can raise anything from inside its decoder
        raise ValueError(f"no header of an image: {_reason(error)}") from error
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width}x{height} pixels, more than {MAX_PIXELS} in all")


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 if there is none."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata of a sound image count as none
        return 1


def upright_rgb(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """Converts an open image to RGB, turned as EXIF says; raises ValueError as `to_rgb` does."""
    return StoredImage(to_rgb(image), orientation_of(image)).upright()


def bits_of(image: Image.Image, data: bytes) -> int:
    """Bits of a channel as the file stores it: Pillow shows 2 and 4 bits of gray as 8, scaled."""
    if data.startswith(b"\x89PNG"):
        return data[24]  # of the header chunk, which comes first
    if image.format == "TIFF":
        return int(getattr(image, "tag_v2", {}).get(_TIFF_BITS, (1,))[0])
    return 8


def check_png(path: Path, data: bytes) -> None:
    """Checks that every chunk of a PNG is complete and matches its checksum.

    A flipped bit would be another class, and Pillow skips the checksums of the pixel data.

    Raises:
      UnreadableError: the file ends early, or a checksum differs.
    """
    # 8 bytes of signature, then chunks: length (4 bytes), kind (4), data, CRC-32 of kind and data (4).
    view, position, kind = memoryview(data), 8, b""
    while kind != b"IEND":
        length = int.from_bytes(view[position : position + 4], "big")
        kind = bytes(view[position + 4 : position + 8])

        end = position + 12 + length
        if end > len(data):
            raise UnreadableError(f"{shown(path)}: the PNG file ends early")
        stored = int.from_bytes(view[end - 4 : end], "big")
        if zlib.crc32(view[position + 4 : end - 4]) != stored:
            raise UnreadableError(f"{shown(path)}: the PNG file is damaged (checksum of {kind!r})")
        position = end


def _deep_rgb(image: Image.Image, data: bytes, orientation: int) -> UInt8[np.ndarray, "h w 3"]:
    """RGB of a decoded file; Pillow would keep only the upper 8 bits of colors with 16.

    Args:
      image: as Pillow decodes it.
      data: the file's bytes, for OpenCV.
      orientation: of EXIF; OpenCV applies it to TIFF files by itself.
    """
    colors = len(image.getbands()) > 1 and bits_of(image, data) == 16
    if not colors or (image.format == "TIFF" and orientation != 1):
        return to_rgb(image)

    # OpenCV keeps 16 bits. If it cannot read the file as Pillow does, 8 bits have to do.
    deep = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if deep is None or deep.dtype != np.uint16 or deep.ndim != 3 or deep.shape[1::-1] != image.size:
        return to_rgb(image)

    # OpenCV gives blue, green, red and perhaps alpha.
    rgb = _eight_bits(deep[..., 2::-1])
    if deep.shape[2] == 4:
        alpha = deep[..., 3:].astype(np.float32) / 65535
        rgb = np.rint(rgb * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return rgb


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Scales numbers of any type to uint8: the smallest becomes 0, the largest 255, nan and inf 0.

    If all values are equal, they count as numbers of 16 bits, of which the upper 8 are taken.

    Raises:
      ValueError: none of them is a finite number.
    """
    # float32 holds 16 bits exactly.
    wide = values.astype(np.float32 if values.dtype.itemsize <= 2 else np.float64)
    finite = np.isfinite(wide)
    if not finite.any():
        raise ValueError("none of its values is a finite number")

    low, high = wide.min(where=finite, initial=np.inf), wide.max(where=finite, initial=-np.inf)
    if low == high:
        return np.full(values.shape, np.clip(low / 256, 0, 255), np.uint8)
    return np.rint(np.where(finite, wide - low, 0) * (255 / float(high - low))).astype(np.uint8)


def _reason(error: BaseException) -> str:
    """Text of an error in one line; its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
