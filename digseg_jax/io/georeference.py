# SPDX-License-Identifier: Apache-2.0
"""GeoTIFF: where on the earth an image lies, rasters of any bands, and masks at the same place.

Reading and writing take rasterio, an optional package; without it a GeoTIFF is an ordinary TIFF.
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from digseg_jax.arraytypes import UInt8

INSTALL = "pip install rasterio"
_PLACE = (33550, 34264)  # TIFF tags ModelPixelScale and ModelTransformation: one of them is there
_ORIENTATION = 274  # TIFF tag; a turned image has no place that this module would know
_COLORS = ("red", "green", "blue")
DRIVER = "GTiff"  # the only one: others follow names in a file to other files, and to the network

Place = dict[str, Any]  # "crs" and "transform", as rasterio takes them


def has_rasterio() -> bool:
    """Whether the optional package is installed."""
    return importlib.util.find_spec("rasterio") is not None


def is_georeferenced(path: Path) -> bool:
    """Whether a file is a georeferenced TIFF; False for what cannot be opened."""
    try:
        with open(path, "rb") as file:
            start = file.read(4)
            if start[:2] not in (b"II", b"MM"):
                return False
            with Image.open(file, formats=["TIFF"]) as image:
                tags = image.tag_v2  # type: ignore[attr-defined]  # of TIFF images
                return any(tag in tags for tag in _PLACE) and tags.get(_ORIENTATION, 1) == 1
    except Image.UnidentifiedImageError:
        return has_rasterio() and _place_of(path) is not None  # more bands than Pillow reads
    except Exception:  # a damaged file can raise anything; its reader reports that
        return False


def _place_of(path: Path) -> Place | None:
    """The place of a raster, from rasterio; None if it has none or is not a raster."""
    import rasterio

    try:
        with quiet(), rasterio.open(path, driver=DRIVER) as raster:
            known = raster.crs is not None or not raster.transform.is_identity
            return {"crs": raster.crs, "transform": raster.transform} if known else None
    except rasterio.errors.RasterioError:
        return None


def read_bands(data: bytes, most: int) -> np.ndarray | None:
    """Red, green and blue of a raster in memory, [h, w, 3] of its own type; see `rgb_bands`.

    Returns:
      None without rasterio, for anything but a raster, and for more than `most` pixels.
    """
    if not has_rasterio():
        return None
    import rasterio

    try:
        with quiet(), rasterio.MemoryFile(data) as memory, memory.open(driver=DRIVER) as raster:
            if raster.width * raster.height > most:
                return None
            return np.moveaxis(raster.read(rgb_bands(raster)), 0, -1)
    except rasterio.errors.RasterioError:
        return None


def rgb_bands(raster: Any) -> list[int]:
    """Numbers of the bands that are marked as red, green and blue, of a dataset of rasterio.

    Else the first three, else the first one three times.
    """
    named = [color.name for color in raster.colorinterp]
    bands = [named.index(c) + 1 for c in _COLORS if c in named]
    if len(bands) == 3:
        return bands
    return [1, 2, 3] if raster.count >= 3 else [1, 1, 1]


def write_raster(
    path: Path,
    source: Path,
    planes: Iterable[np.ndarray],
    names: Sequence[str],
    *,
    nothing: int | None = None,
    colors: UInt8[np.ndarray, "n 3"] | None = None,
) -> None:
    """Writes planes as bands of a GeoTIFF at the place of `source`.

    Args:
      path: of the new file.
      source: raster at that place, of the same height and width.
      planes: uint8 or uint16 [h, w] of each name, taken one at a time.
      names: descriptions of the bands.
      nothing: value of pixels without data; None: all have data.
      colors: RGB of the values 0, 1, ... of a single band.
    """
    # The first plane has the type and size of all.
    rest = iter(planes)
    first = next(rest)
    place, dtype = _place_of(source), first.dtype.name
    with new_raster(path, first.shape, place, dtype, names, nothing=nothing, colors=colors) as out:
        for band, plane in enumerate(chain([first], rest), start=1):
            out.write(plane, band)


@contextlib.contextmanager
def new_raster(
    path: Path,
    shape: tuple[int, int],
    place: Place | None,
    dtype: str,
    names: Sequence[str],
    *,
    nothing: int | None = None,
    colors: UInt8[np.ndarray, "n 3"] | None = None,
) -> Iterator[Any]:
    """Yields an empty GeoTIFF, a dataset of rasterio; more than 4 GiB make it a BigTIFF.

    Args:
      path: of the new file.
      shape: height and width, pixels.
      place: None: it has none.
      dtype: of its numbers.
      names, nothing, colors: see `write_raster`.
    """
    import rasterio

    profile = {
        "driver": DRIVER, "compress": "deflate", "interleave": "band", "BIGTIFF": "IF_SAFER",
        "height": shape[0], "width": shape[1], "count": len(names), "dtype": dtype, "nodata": nothing,
    }  # fmt: skip
    with quiet(), rasterio.open(path, "w", **profile, **(place or {})) as out:
        for band, name in enumerate(names, start=1):
            out.set_band_description(band, name)
        if colors is not None:
            out.write_colormap(1, {i: (*map(int, color), 255) for i, color in enumerate(colors)})
        yield out


def quiet() -> warnings.catch_warnings:
    """A context without rasterio's warning of rasters that have no place."""
    return warnings.catch_warnings(action="ignore")
