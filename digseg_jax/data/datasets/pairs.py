# SPDX-License-Identifier: Apache-2.0
"""Random-access sources over the files of a download: pairs of image and label, decoded on access."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from digseg_jax.data.datasets.decode import SizeError, check_size
from digseg_jax.errors import UserError
from digseg_jax.io.files import UnreadableError, shown
from digseg_jax.io.image_file import StoredImage, read_image

# (label file, (height, width) of the stored image) -> int32 [h, w], ignore = -1
ReadLabel = Callable[[Path, tuple[int, int]], np.ndarray]

# Names of what archives and desktops leave behind.
_JUNK = ("__MACOSX", "Thumbs.db", ".ipynb_checkpoints")


# Splits that images without splits get.
DIVIDED = ("train", "val")
_ONE_IN = 5  # of them is for validation


class Pair(NamedTuple):
    """An example: its name, and the paths of image and label relative to the source's root."""

    name: str
    image: str
    label: str


class FileSource:
    """Random access in grain's sense: [i] -> {"image" uint8 [h, w, 3], "label" int32 [h, w], "name"}.

    The label has the resolution of its file; ignored pixels are -1. `image_is_file` tells
    whether the image equals its file's content; where it does not (A-847 resizes), storing
    it means encoding it again.

    Args:
      root: folder that the pairs' paths are relative to.
      pairs: the examples, in their order.
      read_label: decodes a label file; None in a subclass that overrides `label`.
      strict: raise on an EXIF orientation that the sizes cannot settle.

    Attributes:
      listed_as: the split whose list was read, if that is not the one that was asked for.
      own_list: whether a list among the data names the examples, so that none of them is missing.

    Raises:
      UnreadableError, SizeError, LabelValueError (all UserErrors): on access, with the file's path.
    """

    image_is_file = True

    def __init__(
        self, root: Path, pairs: Sequence[Pair], read_label: ReadLabel | None, strict: bool = False
    ):
        self.root, self.pairs, self.read_label, self.strict = root, list(pairs), read_label, strict
        self.listed_as, self.own_list = "", False

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image_path, label_path = self.files(index).values()

        # Some labels are painted, not read: they need the size of the stored image.
        stored = read_image(image_path)
        label = self.label(index, stored.pixels.shape[:2])

        # The label decides whether the image is to be turned; only then do the sizes have to agree.
        image = orient(stored, label.shape, image_path, self.strict)
        check_size(label_path, label, image)
        return {"image": image, "label": label, "name": shown(self.pairs[index].name)}

    def label(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """Label of an example, int32 [h, w], without decoding its image of `size` (height, width)."""
        if self.read_label is None:
            raise NotImplementedError(f"{type(self).__name__}.label")
        return self.read_label(self.files(index)["label"], size)

    def files(self, index: int) -> dict[str, Path]:
        """Paths of an example's files: {"image", "label"}."""
        pair = self.pairs[index]
        return {"image": self.root / pair.image, "label": self.root / pair.label}


def orient(image: StoredImage, size: tuple[int, int], path: Path, strict: bool) -> np.ndarray:
    """Brings an image onto its label's pixels: as stored, or turned as EXIF says if only that fits.

    Masks of the public data sets lie on the stored pixels. An orientation that keeps the size (half a
    turn, a mirror, any turn of a square) cannot be recognized by the sizes: the image stays as stored.

    Args:
      size: (height, width) of the label.
      path: the image's file, for messages.
      strict: raise instead if the sizes do not decide.

    Raises:
      SizeError: with `strict` only.
    """
    # No EXIF orientation, or one that does not exist: nothing to turn.
    size_as_stored = image.pixels.shape[:2]
    if image.orientation == 1 or image.orientation not in range(2, 9):
        return image.pixels

    # Turning it changes the size, and only the turned size fits the label: no doubt.
    upright = image.upright()
    if upright.shape[:2] == size != size_as_stored:
        return upright

    # A user's own data: either answer may be right, and the wrong one would train on nonsense.
    if strict and upright.shape[:2] == size_as_stored:
        raise SizeError(
            f"{path}: EXIF orientation {image.orientation}, and the sizes do not tell whether the "
            "mask was drawn on the turned image: save the image upright"
        )
    return image.pixels


def divide(pairs: Sequence[Pair], split: str) -> list[Pair]:
    """The part of examples without splits that becomes one: "val" is a fifth of them, "train" the rest.

    Checksums of the names choose, so that it is the same part everywhere, in every order.

    Raises:
      UserError: one example alone, for "val".
    """
    ranked = sorted(pairs, key=lambda pair: zlib.crc32(os.fsencode(pair.name)))
    count = max(len(pairs) // _ONE_IN, 1) if len(pairs) > 1 else 0
    if split == "val" and not count:
        raise UserError("folder: one image alone, and no val split: label another one")
    held_out = {pair.name for pair in ranked[:count]}
    return [pair for pair in pairs if (pair.name in held_out) == (split == "val")]


def is_junk(name: str) -> bool:
    """True for files that archives and desktops leave behind: they are never part of a data set."""
    return name.startswith(".") or name in _JUNK


def list_files(
    folder: Path, suffixes: Iterable[str], generated: tuple[str, ...] = ()
) -> dict[str, str]:
    """Files of a folder: {stem: file name}, where stem is the name without the first matching suffix.

    Args:
      suffixes: matched without regard to case, the first match counts: longer ones go first.
      generated: endings (in lower case) of files that other projects put beside the originals.

    Raises:
      UnreadableError: no such folder.
      UserError: two files with one stem.
    """
    # Sorted, so that an error names the same file on every machine.
    suffixes, found = tuple(suffixes), dict[str, str]()
    try:
        names = sorted(entry.name for entry in _scan(folder))
    except OSError as error:
        raise UnreadableError(f"{folder}: no such folder ({error.strerror})") from error

    # Two files of one stem (a.jpg, a.jpeg) leave open which one the label belongs to.
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
    """Entries of a folder without the folders among them."""
    with os.scandir(folder) as entries:
        return [e for e in entries if not e.is_dir()]


def pair_up(root: Path, images: dict[str, str], labels: dict[str, str], what: str) -> list[Pair]:
    """Pairs by stem, sorted by it; never by position in two sorted lists.

    images, labels: {stem: path relative to root}. what: data set and split, for messages.

    Raises:
      UserError: no examples, an image without a label, or a label without an image.
    """
    # Both directions: a partial download must not train on what happens to be complete.
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
    """Pairs the files of two flat folders, given relative to root.

    Raises:
      UserError: as `list_files` and `pair_up` do.
    """
    sides = [
        {
            stem: f"{folder}/{name}"
            for stem, name in list_files(root / folder, suffixes, generated).items()
        }
        for folder, suffixes in ((image_dir, image_suffixes), (label_dir, label_suffixes))
    ]
    images, labels = sides
    return pair_up(root, images, labels, what)


def pick(available: dict[str, str], stems: Iterable[str], folder: Path, what: str) -> dict[str, str]:
    """Picks the files of an explicit list of stems, in its order.

    Args:
      available: {stem: path}.
      stems: the list.
      folder: where the files are, for the message.
      what: data set and split, for the message.

    Raises:
      UserError: a listed stem has no file.
    """
    stems = list(stems)
    missing = [s for s in stems if s not in available]
    if missing:
        raise UserError(
            f"{what}: {len(missing)} of {len(stems)} listed examples have no file in {folder}, "
            f"the first is {missing[0]!r}"
        )
    return {s: available[s] for s in stems}


def find_root(root: Path, markers: str | Sequence[str], inside: Sequence[str], what: str) -> Path:
    """Folder that holds a marker: root itself, or one of the names that the archives unpack to.

    Args:
      markers: relative paths, one of which must exist.
      inside: names of folders in root to look into.

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
    """The first of `names` that is a folder in root.

    Raises:
      UserError: none of them is.
    """
    for name in names:
        if (root / name).is_dir():
            return name
    raise UserError(f"{what}: {root} has none of the folders {', '.join(names)}")


def list_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted.

    Raises:
      UnreadableError: no such folder.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not is_junk(e.name))
    except OSError as error:
        raise UnreadableError(f"{folder}: no such folder ({error.strerror})") from error


def _is_new(folder: str, seen: set[str]) -> bool:
    """Whether a folder, links followed, is not among those seen; it is then."""
    place = os.path.realpath(folder)
    new = place not in seen
    seen.add(place)
    return new


def walk_files(root: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files with one of the suffixes, at any depth and behind links, relative to root and sorted.

    Raises:
      UnreadableError: no such folder.
    """
    if not root.is_dir():
        raise UnreadableError(f"{root}: no such folder")
    found, top = [], Path(os.path.realpath(root))
    seen = {str(place) for place in (top, *top.parents)}
    for folder, names, files in os.walk(root, followlinks=True):
        # In place: os.walk then leaves these folders out, and those that links lead back to.
        names[:] = [n for n in names if not is_junk(n) and _is_new(os.path.join(folder, n), seen)]
        found += [
            Path(folder, f).relative_to(root)
            for f in files
            if f.lower().endswith(tuple(suffixes)) and not is_junk(f)
        ]
    return sorted(found)
