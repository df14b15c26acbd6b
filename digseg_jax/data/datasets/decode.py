# SPDX-License-Identifier: Apache-2.0
"""Decodes label files to arrays of ids, or raises an error that names the file.

Only lossless formats are opened, because a class id must survive, and a PNG must match its checksums.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from digseg_jax.data.datasets.spec import IGNORE, DatasetSpec
from digseg_jax.errors import UserError
from digseg_jax.io.files import UnreadableError, read_bytes
from digseg_jax.io.image_file import bits_of, check_png, decode

LABEL_FORMATS = ("PNG", "TIFF", "BMP")
# Pillow's modes of one channel; "P" holds palette indices, "I" 16 or 32 bits.
_INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


class SizeError(UserError):
    """A label that differs from its image in size."""


class LabelValueError(UserError):
    """A label value that has no meaning in its data set."""


def read_index_image(path: Path) -> np.ndarray:
    """Reads class indices [h, w], uint8 or wider, from a gray or palette file.

    Raises:
      UnreadableError: also for colors or transparency: `convert("L")` would invent values; and for a
        palette of grays that are not numbered by their values.
    """
    image, bits = _decode_label_and_bits(path)

    # Painting programs store gray as RGB: three equal channels, and an opaque fourth.
    if image.mode in ("RGB", "RGBA", "LA"):
        rgba = np.asarray(image.convert("RGBA"))
        if (rgba[..., :3] == rgba[..., :1]).all() and (rgba[..., 3] == 255).all():
            return rgba[..., 0]
    if image.mode not in _INDEX_MODES:
        raise UnreadableError(
            f"{path}: mode {image.mode}; a label has one channel of class indices (or a palette)"
        )

    # Pillow spreads 2 and 4 bits of gray over 0..255; indices are what the file stores.
    raw = np.asarray(image)
    if image.mode == "P":
        _check_grays(path, np.reshape(image.getpalette("RGB") or [], (-1, 3)), np.unique(raw))
    if image.mode == "L" and bits in (2, 4):
        raw = raw // (255 // (2**bits - 1))
    return raw.astype(np.uint8) if raw.dtype == bool else raw


def _check_grays(path: Path, palette: np.ndarray, used: np.ndarray) -> None:
    """Raises UnreadableError for a gray label that a tool has stored with a palette of its grays.

    Its numbers are places in the palette then, no classes. A label painted with colors, as usual, has
    its classes for numbers, and so has one of black and white.
    """
    grays = palette[:, 0]
    if not len(palette) or (palette != palette[:, :1]).any() or set(grays) <= {0, 255}:
        return
    used = used[used < len(grays)]
    if (grays[used] != used).any():
        raise UnreadableError(
            f"{path}: a palette of grays, whose numbers are not the values of the grays; save it as "
            "gray with 8 bits, without a palette"
        )


def read_gray_label(path: Path) -> np.ndarray:
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
        raise UnreadableError(f"{path}: holds colors; this label is gray")
    return rgb[..., 0]


def read_color_label(path: Path) -> np.ndarray:
    """Reads a label whose colors are codes, uint8 [h, w, 3]; palettes and gray files become RGB.

    Raises:
      UnreadableError: also for more than 8 bits.
    """
    image = _decode_label(path)
    if image.mode not in ("RGB", "RGBA", "P", "PA", "L", "LA", "1"):
        raise UnreadableError(f"{path}: mode {image.mode}; this label is coded in RGB")
    return np.asarray(image.convert("RGBA"))[..., :3]  # RGBA keeps the colors of clear pixels


class LabelTable:
    """Lookup table from label values to ids 0..n-1, or -1 for ignored ones; unknown values raise.

    Args:
      classes: for each id, the label values that mean it.
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
        # Values beyond the table must not index it; they are unknown like those in its gaps.
        outside = (raw < 0) | (raw >= len(self.lookup))
        label = self.lookup[np.where(outside, 0, raw)] if outside.any() else self.lookup[raw]

        # Name the first unknown pixel: it hints at a wrong file, a lossy copy or another release.
        unknown = outside | (label == self.UNKNOWN)
        if unknown.any():
            y, x = np.argwhere(unknown)[0]
            count = len(np.unique(raw[unknown]))
            more = f" ({count - 1} other unknown values)" if count > 1 else ""
            raise LabelValueError(
                f"{path}: label value {raw[y, x]} at row {y}, column {x} is not a class of "
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


def _decode_label(path: Path) -> Image.Image:
    """Opens a label file; a PNG's checksums are compared first."""
    return _decode_label_and_bits(path)[0]


def _decode_label_and_bits(path: Path) -> tuple[Image.Image, int]:
    """Opens a label file, and returns with it the bits of its channels (`bits_of`)."""
    data = read_bytes(path)
    if data.startswith(b"\x89PNG"):
        check_png(path, data)
    image = decode(path, data, LABEL_FORMATS)
    return image, bits_of(image, data)
