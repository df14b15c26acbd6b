# SPDX-License-Identifier: Apache-2.0
"""Segmentation of rasters that are too large to be read whole, by windows from disk.

The windows are those that `segmentation.views` would cut the whole raster into, with the same noise:
masks are the same to rounding. One row of windows is read and segmented at a time, and what no later
row changes is written; so memory is bounded by a row of windows, whatever the raster's height.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from digseg_jax.arraytypes import Float, UInt8
from digseg_jax.config.sampling import EStep
from digseg_jax.errors import UserError
from digseg_jax.io.files import MAX_BYTES, shown
from digseg_jax.io.georeference import new_raster
from digseg_jax.io.image_file import MAX_PIXELS
from digseg_jax.io.raster import Raster, raster_shape
from digseg_jax.prediction.answer import MostProbable
from digseg_jax.prediction.files import SHOWN, write_json
from digseg_jax.prediction.request import Request
from digseg_jax.prediction.segmenter import Segmenter
from digseg_jax.prediction.targets import PredictionFiles
from digseg_jax.segmentation.resize import scaled_shape
from digseg_jax.segmentation.views import starts, window_weight
from digseg_jax.viz import images as viz

_HELD = 2**24  # numbers that are read, or brought to the raster's size, at a time

Band = Float[np.ndarray, "q h w"]  # some rows of every query's probability


def is_large(path: Path) -> bool:
    """Whether a file is a TIFF of more pixels or bytes than are read at a time; needs rasterio."""
    shape = raster_shape(path)
    return shape is not None and (shape[0] * shape[1] > MAX_PIXELS or path.stat().st_size > MAX_BYTES)


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """A raster whose short side is scaled down to `shape`, read some rows at a time."""

    raster: Raster
    shape: tuple[int, int]

    def rows(self, first: int, last: int) -> UInt8[np.ndarray, "h w 3"]:
        """Rows of the scaled raster: averages of the areas that its pixels cover."""
        if self.shape == self.raster.shape:
            return self.raster.rows(first, last)
        return np.concatenate([self._row(y) for y in range(first, last)])

    def _row(self, y: int) -> UInt8[np.ndarray, "1 w 3"]:
        """One row: its columns are averaged first, then its rows, in parts of bounded size."""
        ratio = self.raster.shape[0] / self.shape[0]
        top, bottom = y * ratio, (y + 1) * ratio
        total = np.zeros((self.shape[1], 3))

        # Rows that are covered in part count for that part.
        step = max(1, _HELD // (3 * self.raster.shape[1]))
        end = min(int(np.ceil(bottom)), self.raster.shape[0])
        for first in range(int(top), end, step):
            last = min(first + step, end)
            wide = self.raster.rows(first, last).astype(np.float32)
            part = cv2.resize(wide, (self.shape[1], last - first), interpolation=cv2.INTER_AREA)
            lines = np.arange(first, last)
            share = np.clip(np.minimum(lines + 1, bottom) - np.maximum(lines, top), 0, 1) / ratio
            total += np.einsum("h,hwc->wc", share, part)
        return np.rint(total)[None].astype(np.uint8)


def segment_raster(
    segmenter: Segmenter,
    raster: Raster,
    queries: Sequence[str],
    estep: EStep,
    seed: int,
    advance: Callable[[int, int], None] | None = None,
    *,
    templates: Sequence[str],
) -> Iterator[tuple[int, Band]]:
    """Yields the first row of a band, and every query's probability there, from top to bottom.

    templates: see `Request`. advance: called with the steps of the network that are done, and their
    total.
    """
    # Never enlarged: a short side above the raster's own leaves it as it is.
    side = min(segmenter.short_side or min(raster.shape), min(raster.shape))
    scaled = _Scaled(raster, scaled_shape(raster.shape, side))
    asked = Request(np.zeros((0, 0, 3), np.uint8), 0, tuple(queries), templates=tuple(templates))
    bands = _probabilities(segmenter, scaled, asked, estep, seed, advance)
    return _enlarged(bands, scaled.shape, raster.shape)


def _probabilities(
    segmenter: Segmenter,
    scaled: _Scaled,
    asked: Request,
    estep: EStep,
    seed: int,
    advance: Callable[[int, int], None] | None,
) -> Iterator[Band]:
    """Yields the rows of the scaled raster's probabilities, from top to bottom.

    asked: the queries and their templates; without an image.
    """
    (height, width), size = scaled.shape, segmenter.size
    tops, columns = (starts(max(n, s), s) for n, s in zip(scaled.shape, size, strict=True))

    # What a window adds to a pixel, summed over a row of windows.
    weight = window_weight(size)
    weights = np.zeros((size[0], max(width, size[1])))
    for left in columns:
        weights[:, left : left + size[1]] += weight
    weights = weights[:, :width]

    # Sums of the rows from `top` on, to which further windows may add.
    count = len(asked.queries)
    total = np.zeros((count, size[0], width))
    norm = np.zeros((size[0], width))
    for number, top in enumerate(tops):
        strip = scaled.rows(top, min(top + size[0], height))
        request = dataclasses.replace(asked, image=strip, first_view=number * len(columns))
        told = None if advance is None else _part_of(advance, number, len(tops))
        options: dict[str, Any] = {"key": seed, "mode": "window", "advance": told}
        (answer,) = segmenter.seen_at(0).segment([request], estep, **options)

        # The strip's planes are means over its windows: the sums come back by their weights.
        rows = len(strip)
        for query in range(count):
            total[query, :rows] += answer.probability(query) * weights[:rows]
        norm[:rows] += weights[:rows]

        # Rows above the next strip are final.
        final = (tops[number + 1] if number + 1 < len(tops) else top + rows) - top
        yield (total[:, :final] / norm[:final]).astype(np.float32)
        total = np.concatenate([total[:, final:], np.zeros((count, final, width))], axis=1)
        norm = np.concatenate([norm[final:], np.zeros((final, width))])


def _part_of(advance: Callable[[int, int], None], part: int, parts: int) -> Callable[[int, int], None]:
    """Wraps `advance`: the steps of one part are reported as steps of the whole."""

    def tell(done: int, total: int) -> None:
        """Reports `done` of a part's `total` steps."""
        advance(part * total + done, parts * total)

    return tell


def _enlarged(
    bands: Iterator[Band], small: tuple[int, int], large: tuple[int, int]
) -> Iterator[tuple[int, Band]]:
    """Brings planes that come in bands of rows to another size, as `resize_probability` does.

    Yields the first row of each new band, and the band.
    """
    # Between which two rows each new row lies, and how far from the upper one.
    place = np.clip((np.arange(large[0]) + 0.5) * small[0] / large[0] - 0.5, 0, small[0] - 1)
    upper = np.floor(place).astype(int)
    lower = np.minimum(upper + 1, small[0] - 1)
    share = (place - upper).astype(np.float32)

    # Rows from `first` on are held, until no new row lies between them any more.
    done, first = 0, 0
    held: Band | None = None
    for band in bands:
        held = band if held is None else np.concatenate([held, band], axis=1)
        ready = int(np.searchsorted(lower, first + held.shape[1]))
        step = max(1, _HELD // (len(held) * large[1]))
        for start in range(done, ready, step):
            rows = slice(start, min(start + step, ready))
            a, b = int(upper[rows][0]) - first, int(lower[rows][-1]) + 1 - first
            wide = _widened(held[:, a:b], large[1])
            part = share[rows][None, :, None]
            above, below = wide[:, upper[rows] - first - a], wide[:, lower[rows] - first - a]
            yield start, above * (1 - part) + below * part

        done = max(done, ready)
        keep = (int(upper[done]) if done < large[0] else small[0]) - first
        held, first = held[:, keep:], first + keep


def _widened(band: Band, width: int) -> Band:
    """The band with another number of columns."""
    if band.shape[2] == width:
        return band
    shape = (width, band.shape[1])
    return np.stack([cv2.resize(plane, shape, interpolation=cv2.INTER_LINEAR) for plane in band])


def write_large(
    files: PredictionFiles,
    raster: Raster,
    queries: Sequence[str],
    bands: Iterator[tuple[int, Band]],
    facts: dict[str, Any],
    colors: UInt8[np.ndarray, "q 3"],
) -> dict[str, Any]:
    """Writes NAME.labels.tif, NAME.probability.tif and NAME.json; returns the content of the last.

    They say what those of `write_prediction` say. An existing file is replaced by a complete one or not
    at all.

    Raises:
      UserError: a file cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".predict_", dir=files.base.parent) as scratch:
            made = dataclasses.replace(files, base=Path(scratch) / files.base.name)
            shares, highest = _write_rasters(made, raster, queries, bands, colors)

            # The summary comes last: it says that the others are there.
            rows = [
                {"query": query, "mask": files.rasters[0].name, "coverage": float(shares[k]),
                 "highest": float(highest[k]), "index": k, "color": viz.to_hex(colors[k])}
                for k, query in enumerate(queries)
            ]  # fmt: skip
            facts = {key: shown(value) if key == "image" else value for key, value in facts.items()}
            height, width = raster.shape
            summary = {**facts, "height": height, "width": width, "queries": rows, "complete": True}
            write_json(made.summary, summary)
            for source, target in reversed(list(zip(made, files, strict=True))):
                source.replace(target)
    except UserError:  # of the image, which is read meanwhile
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"--out={shown(files.base)}: cannot be written ({error})") from error
    return summary


def _write_rasters(
    files: PredictionFiles,
    raster: Raster,
    queries: Sequence[str],
    bands: Iterator[tuple[int, Band]],
    colors: UInt8[np.ndarray, "q 3"],
) -> tuple[np.ndarray, np.ndarray]:
    """Writes both GeoTIFFs band by band; returns each query's coverage and highest probability."""
    small = len(queries) <= 255
    nothing, dtype = (255, "uint8") if small else (65535, "uint16")
    meaning = ", ".join(f"{k} {query}" for k, query in enumerate(queries))
    covered, highest = np.zeros(len(queries)), np.zeros(len(queries))

    label_file, soft_file = files.rasters
    new = functools.partial(new_raster, shape=raster.shape, place=raster.place)
    with (
        new(
            label_file, dtype=dtype, names=[meaning], nothing=nothing, colors=colors if small else None
        ) as labels,
        new(soft_file, dtype="uint8", names=queries) as soft_masks,
    ):
        for first, band in bands:
            # float16, as the files of other images are judged.
            soft = band.astype(np.float16)
            window = ((first, first + soft.shape[1]), (0, raster.shape[1]))
            winner = MostProbable(SHOWN)
            for plane in soft:
                winner.see(plane)

            index = np.where(winner.label < 0, nothing, winner.label).astype(dtype)
            labels.write(index, 1, window=window)
            soft_masks.write(np.stack([viz.gray_levels(plane) for plane in soft]), window=window)
            covered += (soft > SHOWN).sum(axis=(1, 2))
            highest = np.maximum(highest, soft.max(axis=(1, 2)))
    return covered / (raster.shape[0] * raster.shape[1]), highest
