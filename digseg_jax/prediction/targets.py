# SPDX-License-Identifier: Apache-2.0
"""Names of the files of a prediction: none is an input, another image's file or somebody else's."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from digseg_jax.errors import UserError
from digseg_jax.io.files import UnreadableError, read_bytes, shown
from digseg_jax.io.names import LONGEST, distinct, key, slug

FileId = tuple[int, int]  # device and number: one file, whatever its names


@dataclasses.dataclass(frozen=True)
class PredictionFiles:
    """The files of one image's prediction.

    Attributes:
      base: FOLDER/NAME.
      parts: what follows NAME in the files of each query: nothing if one is asked, or _QUERY.
      ending: of the masks.
    """

    base: Path
    parts: tuple[str, ...]
    ending: str = ".png"

    @classmethod
    def of(cls, base: Path, queries: Sequence[str], ending: str = ".png") -> PredictionFiles:
        """The files of queries, of which no two share one."""
        if len(queries) == 1:
            return cls(base, ("",), ending)
        # A query called "overlay" or "a.probability" meets no other file: slugs have no dots.
        return cls(base, tuple(f"_{part}" for part in distinct(map(slug, queries))), ending)

    @property
    def archive(self) -> Path:
        """The soft masks."""
        return self._file("", ".npz")

    @property
    def summary(self) -> Path:
        """What was asked and found."""
        return self._file("", ".json")

    @property
    def overlay(self) -> Path:
        """All queries over the image."""
        return self._file("", ".overlay.png")

    def mask(self, query: int) -> Path:
        """The mask of a query by its place."""
        return self._file(self.parts[query], self.ending)

    def probability(self, query: int) -> Path:
        """The soft mask of a query by its place."""
        return self._file(self.parts[query], ".probability.png")

    def __iter__(self) -> Iterator[Path]:
        """Every file: the summary first."""
        yield from (self.summary, self.archive, self.overlay)
        for query in range(len(self.parts)):
            yield self.mask(query)
            yield self.probability(query)

    def _file(self, part: str, ending: str) -> Path:
        return self.base.parent / f"{self.base.name}{part}{ending}"


def targets(images: Sequence[Path], out: Path, queries: Sequence[str]) -> list[PredictionFiles]:
    """Names the files of every image; --out is made if it is a folder.

    In a folder an image's files begin with its stem, with its whole name where two stems are alike, and
    with a number where they would replace a file that is not of an earlier prediction.

    Raises:
      UserError: an illegal name, one file for several images, or a file that must not be replaced.
    """
    out = Path(out).expanduser()
    if out.suffix.lower() == ".png":
        return [_named(images, out, queries)]
    if out.suffix and not out.is_dir():
        raise UserError(f"--out={out}: must be a folder or the name of a file that ends in .png")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(13, "no permission to write there")
    except OSError as error:
        raise UserError(f"--out={out}: cannot be made ({error.strerror})") from error

    # Files that are there already; only they can be replaced.
    names = [key(name) for name in os.listdir(out)]
    there, inputs = set(names), _ids(images) if names else set[FileId]()
    stems = Counter(key(path.stem) for path in images)

    planned, taken = [], set[str]()
    for image in images:
        for name in _candidates(image, alone=stems[key(image.stem)] == 1):
            files = PredictionFiles.of(out / name, queries)
            keys = {key(file.name) for file in files}
            if not keys & taken and (not keys & there or _replaceable(files, inputs)):
                break
        taken |= keys
        planned.append(files)
    return planned


def check_not_replaced(files: PredictionFiles, images: Sequence[Path], name: str) -> None:
    """Raises UserError if a file of the prediction is one of the images.

    name: what the error calls the prediction's files.
    """
    inputs = _ids(images)
    for file in files:
        if _id(file) in inputs:
            raise UserError(f"{name}: would replace the image {shown(file)}; choose another name")


def _named(images: Sequence[Path], out: Path, queries: Sequence[str]) -> PredictionFiles:
    """The files beside a mask that the user named.

    Raises:
      UserError: see `targets`.
    """
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: no such directory {out.parent}")
    if out.is_dir():
        raise UserError(f"--out={out}: must be a folder or the name of a file that ends in .png")
    if len(images) > 1:
        raise UserError(f"--out={out}: one file for {len(images)} images; name a folder")

    # The mask itself may be replaced, as it was named; what lies beside it was not.
    files = PredictionFiles.of(out.with_suffix(""), queries, out.suffix)
    check_not_replaced(files, images, f"--out={out}")
    if not _ours(files):
        beside = next((f for f in files if f != out and f.exists()), None)
        if beside is not None:
            raise UserError(
                f"--out={out}: would replace {beside}, which no prediction wrote; choose another name"
            )
    return files


def _candidates(image: Path, *, alone: bool) -> Iterator[str]:
    """Names for the files of an image, the best first, without end."""
    stem = _short(shown(image.stem))
    if alone:
        yield stem
    yield (whole := _short(shown(image.name)).replace(".", "_"))
    number = 2
    while True:
        yield f"{whole}_{number}"
        number += 1


def _short(name: str) -> str:
    """A name that leaves room for a query and an ending."""
    return name.encode()[:LONGEST].decode("utf-8", errors="ignore")


def _replaceable(files: PredictionFiles, inputs: set[FileId]) -> bool:
    """Whether those of the files that exist were written by a prediction."""
    found = [file for file in files if file.exists() or file.is_symlink()]
    return not found or (_ours(files) and not any(_id(file) in inputs for file in found))


def _ours(files: PredictionFiles) -> bool:
    """Whether the summary that is there is of a prediction: labeling tools write NAME.json too."""
    if not files.summary.is_file():
        return False
    try:
        found = json.loads(read_bytes(files.summary, limit=2**26))
    except (UnreadableError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"estep", "queries", "height", "width"} <= found.keys()


def _ids(paths: Sequence[Path]) -> set[FileId]:
    """Which files the paths are."""
    return {found for path in paths if (found := _id(path)) is not None}


def _id(path: Path) -> FileId | None:
    """Which file a path is; None if it is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
