# SPDX-License-Identifier: Apache-2.0
"""TIFFs that are too large to be read whole: RGB of 8 bits, some rows at a time.

Needs rasterio, an optional package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

import numpy as np

from digseg_jax.arraytypes import UInt8
from digseg_jax.io.files import UnreadableError, shown
from digseg_jax.io.georeference import DRIVER, Place, has_rasterio, quiet, rgb_bands

# Kinds of the bands of 8 bits that are gray or colors already; the numbers of others are stretched.
_RGB = ["red", "green", "blue"]
_AS_STORED = (["gray"], ["gray", "alpha"], ["palette"], _RGB, [*_RGB, "alpha"])
_READ = 2**24  # values that are read at a time where the whole raster is looked through


class Raster:
    """An open TIFF.

    Attributes:
      path: its file.
      shape: height and width, pixels.
      place: where it lies, for `new_raster`.
    """

    def __init__(self, path: Path):
        """Opens a file.

        Raises:
          UnreadableError: it is no TIFF.
        """
        import rasterio

        self.path, self._error = path, rasterio.errors.RasterioError
        try:
            with quiet():
                self._file = rasterio.open(path, driver=DRIVER)
        except self._error as error:
            raise UnreadableError(f"{shown(path)}: cannot be read as a TIFF ({error})") from error
        self.shape = (self._file.height, self._file.width)
        self.place: Place = {"crs": self._file.crs, "transform": self._file.transform}
        self._bands = rgb_bands(self._file)
        self._range: tuple[float, float] | None = None

        # What the bands of 8 bits mean, as in an image file.
        self._kinds = [color.name for color in self._file.colorinterp]
        self._stored = self._file.dtypes[0] == "uint8" and self._kinds in _AS_STORED

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def rows(self, first: int, last: int) -> UInt8[np.ndarray, "h w 3"]:
        """RGB of the rows from `first` up to, not including, `last`.

        Numbers of 8 bits are colors; of others the smallest in the raster becomes 0, the largest 255;
        equal ones count as numbers of 16 bits, as in other images.
        Transparent pixels are laid over white.

        Raises:
          UnreadableError: the file is damaged.
        """
        values = self._read(self._bands, first, last)
        if self._stored:
            return self._colors(values, first, last)

        # float32 holds 16 bits exactly.
        low, high = self._limits()
        if low == high:
            return np.full(values.shape, np.clip(low / 256, 0, 255), np.uint8)
        wide: np.ndarray = values.astype("float32" if values.dtype.itemsize <= 2 else "float64")
        scaled = np.where(np.isfinite(wide), wide - low, 0) * (255 / (high - low))
        return np.rint(scaled).astype(np.uint8)

    def _colors(self, values: np.ndarray, first: int, last: int) -> UInt8[np.ndarray, "h w 3"]:
        """RGB of values of 8 bits: by the palette, or over white where they are transparent."""
        if self._kinds == ["palette"]:
            palette = self._file.colormap(1)
            return np.array([palette[i][:3] for i in range(256)], np.uint8)[values[..., 0]]
        if "alpha" not in self._kinds:
            return values

        alpha = self._read([self._kinds.index("alpha") + 1], first, last) / np.float32(255)
        return np.rint(values * alpha + 255 * (1 - alpha)).astype(np.uint8)

    def _read(self, bands: list[int], first: int, last: int) -> np.ndarray:
        """Values [h, w, bands] of some rows."""
        window = ((first, last), (0, self.shape[1]))
        try:
            values = self._file.read(bands, window=window)
        except self._error as error:
            raise UnreadableError(f"{shown(self.path)}: cannot be read ({error})") from error
        return np.moveaxis(values, 0, -1)

    def _limits(self) -> tuple[float, float]:
        """Smallest and largest number of the whole raster, which is looked through once.

        Raises:
          UnreadableError: none of them is finite.
        """
        if self._range is not None:
            return self._range

        low, high = np.inf, -np.inf
        step = max(1, _READ // (3 * self.shape[1]))
        for first in range(0, self.shape[0], step):
            last = min(first + step, self.shape[0])
            values = self._read(self._bands, first, last).astype(np.float64)
            finite = np.isfinite(values)
            low = min(low, values.min(where=finite, initial=np.inf))
            high = max(high, values.max(where=finite, initial=-np.inf))
        if low > high:
            raise UnreadableError(f"{shown(self.path)}: none of its numbers is finite")
        self._range = float(low), float(high)
        return self._range


def raster_shape(path: Path) -> tuple[int, int] | None:
    """Height and width of a TIFF; None without rasterio, and for what is no TIFF."""
    if not has_rasterio():
        return None
    try:
        with open(path, "rb") as file:
            if file.read(2) not in (b"II", b"MM"):
                return None
        with Raster(path) as raster:
            return raster.shape
    except (OSError, ValueError, UnreadableError):
        return None
