# SPDX-License-Identifier: Apache-2.0
"""Random-access sources over the files of a download: pairs of image and label, decoded on access."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from digseg_jax.data.datasets.decode import (
    Picture,
    SizeError,
    UnreadableError,
    check_size,
    read_picture,
)
from digseg_jax.errors import UserError

# (label file, (height, width) of the stored image) -> int32 [h, w], ignore = -1
ReadLabel = Callable[[Path, tuple[int, int]], np.ndarray]

_JUNK = ("__MACOSX", "Thumbs.db", ".ipynb_checkpoints")


class Pair(NamedTuple):
    """An example: its name, and image and label relative to the source's root."""

    name: str
    image: str
    label: str


class FileSource:
    """grain's random access: [i] -> {"image" uint8 [h, w, 3], "label" int32 [h, w], "name"}.

    The label is at the resolution of its file; ignored pixels are -1. `image_is_file` tells whether
    the image is what its file holds; if not (A-847 resizes), it has to be encoded to be stored.

    Raises on access:
      UnreadableError, SizeError, LabelValueError (all of them UserError) with the file's path.
    """

    image_is_file = True

    def __init__(self, root: Path, pairs: Sequence[Pair], read_label: ReadLabel, strict: bool = False):
        """strict: an EXIF orientation that the sizes cannot settle is an error."""
        self.root, self.pairs, self.read_label, self.strict = root, list(pairs), read_label, strict

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image_path, label_path = self.files(index).values()
        picture = read_picture(image_path)
        label = self.label(index, picture.pixels.shape[:2])
        image = orient(picture, label.shape, image_path, self.strict)
        check_size(label_path, label, image)
        return {"image": image, "label": label, "name": self.pairs[index].name}

    def label(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """int32 [h, w] of an example, whose image has `size`; alone, without decoding the image."""
        return self.read_label(self.files(index)["label"], size)

    def files(self, index: int) -> dict[str, Path]:
        """The files behind an example: {"image", "label"}."""
        pair = self.pairs[index]
        return {"image": self.root / pair.image, "label": self.root / pair.label}


def orient(picture: Picture, size: tuple[int, int], path: Path, strict: bool) -> np.ndarray:
    """The image on the pixels of its label: as stored, or turned as EXIF says if only that fits.

    Masks of the public data sets lie on the stored pixels. An orientation that keeps the size (half a
    turn, a mirror, any turn of a square) cannot be told from sizes: as stored, or an error if strict.
    """
    stored = picture.pixels.shape[:2]
    if picture.orientation == 1 or picture.orientation not in range(2, 9):
        return picture.pixels
    upright = picture.upright()
    if upright.shape[:2] == size != stored:
        return upright
    if strict and upright.shape[:2] == stored:
        raise SizeError(
            f"{path}: EXIF orientation {picture.orientation}, and the sizes do not tell whether the "
            "mask was drawn on the turned image: save the image upright"
        )
    return picture.pixels


def is_junk(name: str) -> bool:
    """Files that archives and desktops leave behind: never part of a data set."""
    return name.startswith(".") or name in _JUNK


def list_files(
    folder: Path, suffixes: Iterable[str], generated: tuple[str, ...] = ()
) -> dict[str, str]:
    """{stem: file name} of a folder, where stem is the name without the first matching suffix.

    generated: endings (in lower case) of files that other projects put beside the originals.

    Raises:
      UnreadableError: no such folder.
      UserError: two files with one stem.
    """
    suffixes, found = tuple(suffixes), {}
    try:
        names = sorted(entry.name for entry in _scan(folder))
    except OSError as error:
        raise UnreadableError(f"{folder}: no such folder ({error.strerror})") from error
    for name in names:
        suffix = next((s for s in suffixes if name.lower().endswith(s.lower())), None)
        if suffix is None or is_junk(name) or name.lower().endswith(generated):
            continue
        stem = name[: -len(suffix)]
        if stem in found:
            raise UserError(f"{folder}: {found[stem]} and {name} are files of one example")
        found[stem] = name
    return found


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [e for e in entries if not e.is_dir()]


def pair_up(root: Path, images: dict[str, str], labels: dict[str, str], what: str) -> list[Pair]:
    """Pairs by stem, sorted by it; never by position in two sorted lists.

    images, labels: {stem: path relative to root}.

    Raises:
      UserError: no examples, an image without a label, or a label without an image.
    """
    for have, lack, kind in ((images, labels, "a label"), (labels, images, "an image")):
        missing = sorted(have.keys() - lack.keys())
        if missing:
            first = root / have[missing[0]]
            raise UserError(f"{what}: {len(missing)} files without {kind}, the first is {first}")
    if not images:
        raise UserError(f"{what}: no examples under {root}")
    return [Pair(stem, images[stem], labels[stem]) for stem in sorted(images)]


def pair_folders(
    root: Path,
    image_dir: str,
    label_dir: str,
    image_suffixes: Iterable[str],
    label_suffixes: Iterable[str],
    what: str,
    generated: tuple[str, ...] = (),
) -> list[Pair]:
    """Pairs of two flat folders, given relative to root; raises as list_files and pair_up do."""
    sides = [
        {
            stem: f"{folder}/{name}"
            for stem, name in list_files(root / folder, suffixes, generated).items()
        }
        for folder, suffixes in ((image_dir, image_suffixes), (label_dir, label_suffixes))
    ]
    return pair_up(root, *sides, what)


def pick(available: dict[str, str], stems: Iterable[str], folder: Path, what: str) -> dict[str, str]:
    """The entries of an explicit list of stems; raises UserError if one of them has no file."""
    stems = list(stems)
    missing = [s for s in stems if s not in available]
    if missing:
        raise UserError(
            f"{what}: {len(missing)} of {len(stems)} listed examples have no file in {folder}, "
            f"the first is {missing[0]!r}"
        )
    return {s: available[s] for s in stems}


def find_root(root: Path, markers: str | Sequence[str], inside: Sequence[str], what: str) -> Path:
    """The folder that holds a marker: root itself or one of the names that the archives unpack to.

    Raises:
      UserError: none of them does; the message names all places looked at.
    """
    markers = (markers,) if isinstance(markers, str) else markers
    places = [root, *(root / name for name in inside)]
    for place in places:
        if any((place / m).exists() for m in markers):
            return place
    looked = ", ".join(str(p / m) for p in places for m in markers)
    raise UserError(f"{what}: not found under {str(root)!r}; looked for {looked}")


def first_folder(root: Path, names: Sequence[str], what: str) -> str:
    """The first of `names` that is a folder in root; raises UserError if none is."""
    for name in names:
        if (root / name).is_dir():
            return name
    raise UserError(f"{what}: {root} has none of the folders {', '.join(names)}")


def list_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; raises UnreadableError if there is none."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not is_junk(e.name))
    except OSError as error:
        raise UnreadableError(f"{folder}: no such folder ({error.strerror})") from error


def walk_files(root: Path, suffixes: Sequence[str]) -> list[Path]:
    """All files with one of the suffixes, at any depth, relative to root and sorted.

    Raises:
      UnreadableError: no such folder.
    """
    if not root.is_dir():
        raise UnreadableError(f"{root}: no such folder")
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [n for n in names if not is_junk(n)]
        found += [
            Path(folder, f).relative_to(root)
            for f in files
            if f.lower().endswith(tuple(suffixes)) and not is_junk(f)
        ]
    return sorted(found)
