# SPDX-License-Identifier: Apache-2.0
"""Names of a prediction's files: none replaces an input, another image's file or a foreign file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from digseg_jax.errors import UserError
from digseg_jax.io.files import UnreadableError, expanded, read_bytes, shown
from digseg_jax.io.names import LONGEST, distinct, key, slug

FileId = tuple[int, int]  # device and number: one file, whatever its names


@dataclasses.dataclass(frozen=True)
class PredictionFiles:
    """The files of one image's prediction.

    Attributes:
      base: FOLDER/NAME.
      parts: for each query, what follows NAME in its files: "" for a single query, else _QUERY.
      ending: ending of the mask files.
      georeferenced: whether there are GeoTIFFs, which a georeferenced image gets.
      large: whether there are only these and the summary: the image is too large for the others.
    """

    base: Path
    parts: tuple[str, ...]
    ending: str = ".png"
    georeferenced: bool = False
    large: bool = False

    @classmethod
    def of(
        cls, base: Path, queries: Sequence[str], ending: str = ".png", **kinds: bool
    ) -> PredictionFiles:
        """The files for a list of queries; different queries get different files.

        kinds: `georeferenced` and `large`.
        """
        if len(queries) == 1:
            return cls(base, ("",), ending, **kinds)

        # Slugs have no dots, so a query called "overlay" or "a.probability" hits no other file.
        return cls(base, tuple(f"_{part}" for part in distinct(map(slug, queries))), ending, **kinds)

    @property
    def archive(self) -> Path:
        """File of the soft masks, NAME.npz."""
        return self._file("", ".npz")

    @property
    def summary(self) -> Path:
        """File with the queries, their coverage and the settings, NAME.json."""
        return self._file("", ".json")

    @property
    def overlay(self) -> Path:
        """File of the image with all queries in color, NAME.overlay.png."""
        return self._file("", ".overlay.png")

    @property
    def labels(self) -> Path:
        """File of the map of query indices, NAME.labels.png."""
        return self._file("", ".labels.png")

    @property
    def coco(self) -> Path:
        """File of the masks as COCO annotations, NAME.coco.json."""
        return self._file("", ".coco.json")

    @property
    def rasters(self) -> tuple[Path, ...]:
        """GeoTIFFs of query indices and of soft masks: NAME.labels.tif, NAME.probability.tif."""
        ends = (".labels.tif", ".probability.tif") if self.georeferenced or self.large else ()
        return tuple(self._file("", end) for end in ends)

    def mask(self, query: int) -> Path:
        """File of a query's mask, by the query's index."""
        return self._file(self.parts[query], self.ending)

    def probability(self, query: int) -> Path:
        """File of a query's soft mask, by the query's index."""
        return self._file(self.parts[query], ".probability.png")

    def __iter__(self) -> Iterator[Path]:
        """Yields every file, the summary first."""
        if self.large:
            yield from (self.summary, *self.rasters)
            return
        yield from (self.summary, self.archive, self.overlay, self.labels, self.coco, *self.rasters)
        for query in range(len(self.parts)):
            yield self.mask(query)
            yield self.probability(query)

    def _file(self, part: str, ending: str) -> Path:
        """FOLDER/NAME + part + ending; NAME itself may have dots."""
        return self.base.parent / f"{self.base.name}{part}{ending}"


@contextlib.contextmanager
def no_empty_folder(out: str | Path) -> Iterator[None]:
    """Removes the folder `out` at the end if the block made it and wrote nothing to it."""
    folder = expanded(out)
    there = folder.exists()
    try:
        yield
    finally:
        if not there:
            with contextlib.suppress(OSError):  # something is in it, or it was not made
                folder.rmdir()


def targets(
    images: Sequence[Path],
    out: Path,
    queries: Sequence[str],
    placed: Collection[Path] = (),
    large: Collection[Path] = (),
) -> list[PredictionFiles]:
    """Chooses the file names of every image's prediction; creates the folder that --out names.

    In a folder, the files of an image begin with its stem; with its whole name if two images share the
    stem; and with a number added if they would replace a file that no earlier prediction wrote.

    placed: those of the images that get GeoTIFFs, too. large: those that get nothing else.

    Raises:
      UserError: an illegal name, one file for several images, or a file that must not be replaced.
    """
    # A name that ends in .png is the mask of a single image; any other name is a folder.
    out = expanded(out)
    if out.suffix.lower() == ".png":
        if large:
            raise UserError(f"--out={out}: so large a raster gets GeoTIFFs; name a folder")
        return [_named(images, out, queries, bool(placed))]
    if out.suffix and not out.is_dir():
        raise UserError(f"--out={out}: must be a folder or the name of a file that ends in .png")

    # Learn now, not after the first image, that nothing can be written there.
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(13, "no permission to write there")
    except OSError as error:
        raise UserError(f"--out={out}: cannot be made ({error.strerror})") from error

    # Names of the existing files; keys ignore case and Unicode form, as some file systems do.
    names = [key(name) for name in os.listdir(out)]
    there, inputs = set(names), _ids(images) if names else set[FileId]()
    stems = Counter(key(path.stem) for path in images)

    # For each image the first name whose files are free, or left by an earlier prediction of it.
    planned, taken = [], set[str]()
    for image in images:
        for name in _candidates(image, alone=stems[key(image.stem)] == 1):
            files = PredictionFiles.of(
                out / name, queries, georeferenced=image in placed, large=image in large
            )
            keys = {key(file.name) for file in files}
            if not keys & taken and (not keys & there or _replaceable(files, inputs, image)):
                break
        taken |= keys
        planned.append(files)
    return planned


def check_not_replaced(files: PredictionFiles, images: Sequence[Path], name: str) -> None:
    """Checks that no file of a prediction is one of the input images, under whatever name.

    name: what the error calls the prediction's files.

    Raises:
      UserError: an image would be replaced.
    """
    inputs = _ids(images)
    for file in files:
        if _id(file) in inputs:
            raise UserError(f"{name}: would replace the image {shown(file)}; choose another name")


def _named(
    images: Sequence[Path], out: Path, queries: Sequence[str], georeferenced: bool
) -> PredictionFiles:
    """The files of a single prediction whose mask the user named with --out=FILE.png.

    Raises:
      UserError: see `targets`.
    """
    # A missing folder is most likely a typo, so it is not created.
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: no such directory {out.parent}")
    if out.is_dir():
        raise UserError(f"--out={out}: must be a folder or the name of a file that ends in .png")
    if len(images) > 1:
        raise UserError(f"--out={out}: one file for {len(images)} images; name a folder")

    if out.exists() and not out.is_file():
        raise UserError(f"--out={out}: is a pipe or a device, which the mask would replace")

    # The mask itself may be replaced, because the user named it; the files beside it were not named.
    files = PredictionFiles.of(out.with_suffix(""), queries, out.suffix, georeferenced=georeferenced)
    check_not_replaced(files, images, f"--out={out}")
    if not _ours(files):
        beside = next((f for f in files if f != out and os.path.lexists(f)), None)
        if beside is not None:
            raise UserError(
                f"--out={out}: would replace {beside}, which no prediction wrote; choose another name"
            )
    return files


def _candidates(image: Path, *, alone: bool) -> Iterator[str]:
    """Yields names for the files of an image, the best first, without end."""
    # The stem if no other image has it, then the whole name, then numbered names.
    stem = _short(shown(image.stem))
    if alone:
        yield stem
    yield (whole := _short(shown(image.name)).replace(".", "_"))
    number = 2
    while True:
        yield f"{whole}_{number}"
        number += 1


def _short(name: str) -> str:
    """The name cut to LONGEST bytes, which leaves room for a query and an ending."""
    # File systems limit bytes, not characters; a character that the cut splits is dropped.
    return name.encode()[:LONGEST].decode("utf-8", errors="ignore")


def _replaceable(files: PredictionFiles, inputs: set[FileId], image: Path) -> bool:
    """Whether all of these files that exist are a prediction's of this image, and none is an input."""
    # A dangling link counts as an existing file: it is not a prediction's.
    found = [file for file in files if os.path.lexists(file)]
    return not found or (_is_of(files, image) and not any(_id(file) in inputs for file in found))


def _is_of(files: PredictionFiles, image: Path) -> bool:
    """Whether NAME.json was written by a prediction of this image; an older one may not say of which.

    The image may have been changed since, or lie at another path: its path or its content is the same.
    """
    summary = read_summary(files)
    if summary is None:
        return False
    if summary.get("image") in (None, shown(image)):
        return True
    try:
        return summary.get("image_crc32") == zlib.crc32(read_bytes(image))
    except UnreadableError:
        return False


def _ours(files: PredictionFiles) -> bool:
    """Whether NAME.json was written by a prediction: labeling tools write files of that name too."""
    return read_summary(files) is not None


def read_summary(files: PredictionFiles) -> dict[str, Any] | None:
    """Content of NAME.json; None if no prediction wrote such a file."""
    if not files.summary.is_file():
        return None

    # A summary is small: beyond 64 MiB the file is somebody else's, and is not read.
    try:
        found = json.loads(read_bytes(files.summary, limit=2**26))
    except (UnreadableError, ValueError, RecursionError):
        return None
    ours = isinstance(found, dict) and {"estep", "queries", "height", "width"} <= found.keys()
    return found if ours else None


def names_of_predictions(folder: Path, names: Collection[str]) -> set[str]:
    """The names of a folder's files that predictions wrote.

    names: of all files of the folder.
    """
    written: set[str] = set()
    for name in names:
        base = folder / name.removesuffix(".json")
        beside = (f"{base.name}{ending}" for ending in (".overlay.png", ".labels.tif"))
        if not name.endswith(".json") or not any(file in names for file in beside):
            continue

        # The prediction's own list of queries tells the names of its masks.
        plain = PredictionFiles.of(base, (), georeferenced=True)
        summary = read_summary(plain)
        rows = summary["queries"] if summary and isinstance(summary["queries"], list) else []
        queries = [str(row["query"]) for row in rows if isinstance(row, dict) and "query" in row]
        if summary is not None:
            files = PredictionFiles.of(base, queries, georeferenced=True)
            written |= {file.name for file in files} | {file.name for file in plain}
    return written


def _ids(paths: Sequence[Path]) -> set[FileId]:
    """Identities of the paths' files; paths without a file are left out."""
    return {found for path in paths if (found := _id(path)) is not None}


def _id(path: Path) -> FileId | None:
    """Identity of a path's file, links followed; None if there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
