# SPDX-License-Identifier: Apache-2.0
"""A user's own data, without code: images/SPLIT/NAME.jpg, masks/SPLIT/NAME.png and classes.txt.

classes.txt has one class per line: a name and perhaps synonyms, separated by commas. All lines, or
none, start with the value that the class has in the masks; without values it is the line's place, from
0. Pixels of a class named `ignore` are left out, and so is 255 unless a line gives it a meaning.

    0: background            #000000: background
    7: road, street          #ff0000: road, street
    9: ignore                #808080: ignore
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from digseg_jax.data.datasets.decode import LabelValueError, read_bytes, read_color_label
from digseg_jax.data.datasets.pairs import FileSource, first_folder, list_folders, pair_folders
from digseg_jax.data.datasets.readers.index import IndexLabels
from digseg_jax.data.datasets.spec import IGNORE, ClassInfo, DatasetSpec
from digseg_jax.errors import UserError

_IMAGES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
_MASKS = (".png", ".tif", ".tiff", ".bmp")
# Optional value (decimal or #rrggbb) and colon, then the names.
_LINE = re.compile(r"(?:(?P<value>\d{1,5}|#[0-9a-fA-F]{6})\s*:)?(?P<names>[^:]+)")
_COLOR = 1 << 24  # added to a color's number, to distinguish it from a plain value


def folder_spec(root: Path) -> DatasetSpec:
    """Spec of a folder, from its classes.txt and the folders in images/.

    Raises:
      UserError: no such files, or a line that cannot be read.
    """
    classes, ignored = read_classes(root / "classes.txt")
    return DatasetSpec(
        name="folder",
        title=f"the user's own data in {root.name}",
        classes=classes,
        ignored_raw=ignored,
        splits=dict.fromkeys(list_folders(root / "images"), 0),
        ignore=", ".join(_written(v) for v in ignored) or "none",
        licence="the user's own",
    )


def read_classes(path: Path) -> tuple[tuple[ClassInfo, ...], tuple[int, ...]]:
    """Reads the classes and the ignored values of a classes.txt.

    Raises:
      UserError: names the file and the line.
    """
    try:
        lines = read_bytes(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: {error}") from error

    # Empty lines do not count as places, but line numbers in messages are the file's.
    rows = [(n, t.strip()) for n, t in enumerate(lines, start=1) if t.strip()]
    classes: list[ClassInfo] = []
    values: dict[int, int] = {}  # value -> line
    ignored: list[int] = []
    kinds = set()
    for place, (number, line) in enumerate(rows):
        # A line without a match, and an empty name between commas, are the same error.
        match = _LINE.fullmatch(line)
        names = [n.strip() for n in match["names"].split(",")] if match else [""]
        if match is None or not all(names):
            raise UserError(f"{path}:{number}: {line!r}; a line is `VALUE: name, synonym, ...`")

        # One value, one meaning.
        value, kind = _value(match["value"], place)
        kinds.add(kind)
        if value in values:
            raise UserError(f"{path}:{number}: {_written(value)} is line {values[value]}'s already")
        values[value] = number

        # An ignored value gets no id.
        if names[0] == "ignore":
            ignored.append(value)
            continue

        color = None
        if kind == "colour":  # the low three of four bytes
            _, red, green, blue = value.to_bytes(4, "big")
            color = (red, green, blue)
        classes.append(ClassInfo(names[0], tuple(names[1:]), (value,), color, names[0]))

    # 255 is void by convention; colors have no such convention.
    _check_classes(path, classes, kinds)
    if 255 not in values and kinds != {"colour"}:
        ignored.append(255)
    return tuple(classes), tuple(ignored)


def _value(text: str | None, place: int) -> tuple[int, str]:
    """Value of a line and its kind; without a value it is the line's place."""
    if text is None:
        return place, "no value"
    if text.startswith("#"):
        return _COLOR + int(text[1:], 16), "colour"
    return int(text), "number"


def _written(value: int) -> str:
    """A value as classes.txt writes it."""
    return f"#{value - _COLOR:06x}" if value >= _COLOR else str(value)


def _check_classes(path: Path, classes: list[ClassInfo], kinds: set[str]) -> None:
    """Checks that there are classes, all lines have one form, and no name occurs twice.

    Raises:
      UserError: names the file.
    """
    if not classes:
        raise UserError(f"{path}: names no class")
    if len(kinds) > 1:
        raise UserError(f"{path}: lines with {' and with '.join(sorted(kinds))}; one form for all")

    # A word with two meanings cannot be a query.
    words = [w.lower() for c in classes for w in (c.name, *c.synonyms)]
    twice = sorted({w for w in words if words.count(w) > 1})
    if twice:
        raise UserError(f"{path}: {twice[0]!r} is named twice")


class ColorLabels:
    """Reader of RGB masks by the colors of classes.txt."""

    def __init__(self, spec: DatasetSpec):
        pairs = [(v - _COLOR, i) for i, c in enumerate(spec.classes) for v in c.raw]
        pairs += [(v - _COLOR, IGNORE) for v in spec.ignored_raw]
        self.codes, self.ids = (np.array(side, np.int32) for side in zip(*sorted(pairs), strict=True))

    def __call__(self, path: Path, size: tuple[int, int]) -> np.ndarray:
        """Ids, int32 [h, w].

        Raises:
          LabelValueError: names the file, the color and where it first occurs.
        """
        # 24-bit codes; looked up by bisection, as a table would have 16 million entries
        code = read_color_label(path).astype(np.int32) @ np.array([65536, 256, 1], np.int32)
        place = np.searchsorted(self.codes, code).clip(max=len(self.codes) - 1)
        unknown = self.codes[place] != code
        if unknown.any():
            y, x = np.argwhere(unknown)[0]
            raise LabelValueError(
                f"{path}: colour #{code[y, x]:06x} at row {y}, column {x} is no class; legal: "
                + ", ".join(f"#{c:06x}" for c in self.codes)
            )
        return self.ids[place]


def open_folder(spec: DatasetSpec, root: Path, split: str) -> FileSource:
    """Opens images/SPLIT with masks/SPLIT or annotations/SPLIT, files of one stem.

    Raises:
      UserError: no such folders, or files without their partner.
    """
    what = f"folder {split}"
    places = (f"masks/{split}", f"annotations/{split}")
    folders = (f"images/{split}", first_folder(root, places, what))
    pairs = pair_folders(root, *folders, _IMAGES, _MASKS, what)

    # All values have one form, so the first tells it. Strict about
    # EXIF: the data are the user's own.
    colored = spec.classes[0].raw[0] >= _COLOR
    return FileSource(root, pairs, ColorLabels(spec) if colored else IndexLabels(spec), strict=True)
