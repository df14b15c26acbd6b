# SPDX-License-Identifier: Apache-2.0
"""Reads lists of classes that people write: classes.txt of their data, vocabularies of a prediction.

One class per line: a name and perhaps synonyms, separated by commas. All lines, or none, start with the
value that the class has in the masks, a number or a color; without values it is the line's place among
the classes, from 0. Blank lines are left out, and so are comments: lines that begin with `#` but not
with a color. Pixels of a class named `ignore` are left out of training and scores.

    0: background            #000000: background      background
    7: road, street          #ff0000: road, street    road, street
    9: ignore                #808080: ignore          ignore

Any other line is an error: a table or a JSON list that was taken for names would shift every class.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import Counter
from pathlib import Path

from digseg_jax.data.datasets.spec import ClassInfo
from digseg_jax.errors import UserError
from digseg_jax.io.files import read_lines, shown
from digseg_jax.io.names import UNSEEN

COLOR = 1 << 24  # added to a color's number, to distinguish it from a plain value
FORM = "a line is `name, synonym` or `VALUE: name, synonym`, VALUE a number or #rrggbb"
# Optional value (decimal or #rrggbb) and colon, then the names.
_LINE = re.compile(r"(?:(?P<value>\d{1,5}|#[0-9a-fA-F]{6})\s*:)?(?P<names>[^:]+)")
_LABEL_MAP = re.compile(r"([^:]+):(\d{1,3}),(\d{1,3}),(\d{1,3})(:[^:]*){0,2}")
_COMMENT = re.compile(r"#(?![0-9a-fA-F]{6}\b|[0-9a-fA-F]{3,8}\s*:)")
MOST = 65535  # masks have up to 16 bits
LONGEST = 2000  # characters of a line
_HEADINGS = frozenset((
    "id", "index", "value", "number", "name", "names", "class", "classes", "class_name", "label",
    "color", "colors", "rgb", "r", "g", "b", "red", "green", "blue", "category", "supercategory",
))  # fmt: skip
_ALONE = frozenset(("class", "classes", "name", "names", "class_name"))  # a heading of one column
# What no name contains, and the advice for such a line.
_FOREIGN = (
    (re.compile(r"\d+\s*[,;=\t .)：]|\d+$"), "a value is followed by a colon, as in `0: soil`"),
    (re.compile(r".*,\s*\d+\s*(,|$)"), "a number among names; the value comes first, as in `0: soil`"),
    (re.compile(r".*[\"`]|'.*'$"), "names have no quotes around them"),
    (re.compile(r".*[\[\]{}<>|;=\t#]"), "a name has none of []{}<>|;=# and no tab"),
    (re.compile(r"[-*+]\s"), "a list of names has no bullets"),
    (
        re.compile(f".*(?:{UNSEEN.pattern})"),
        "a name has no control or invisible characters: type it again",
    ),
    (re.compile(r".*[，、]"), "names are separated by the comma `,`"),
    (re.compile(r"\W|_"), "a name begins with a letter or a digit, and a comment with `#`"),
)


@dataclasses.dataclass(frozen=True)
class ClassList:
    """The classes of a list, with their values in the masks.

    Attributes:
      classes: in the order of their ids; `raw` holds the value in the masks.
      ignored: values whose pixels belong to no class.
      kind: what the lines start with: "no value", "number" or "color".
    """

    classes: tuple[ClassInfo, ...]
    ignored: tuple[int, ...]
    kind: str

    @property
    def values(self) -> set[int]:
        """Every value that a line gives a meaning."""
        return {v for c in self.classes for v in c.raw} | set(self.ignored)


def read_class_list(path: Path) -> ClassList:
    """Reads a list of classes; see the top of this module.

    Raises:
      UserError: names the file and the line.
    """
    return _class_list(path, [row for row in read_lines(path) if not _COMMENT.match(row[1])])


def read_label_map(path: Path) -> ClassList:
    """Reads the labelmap.txt of a VOC-style export: lines `NAME:R,G,B:PARTS:ACTIONS` and comments.

    Names and colors are used; parts and actions are other annotations' business.

    Raises:
      UserError: names the file and the line.
    """
    rows = []
    for number, line in read_lines(path):
        if line.startswith("#"):
            continue
        match = _LABEL_MAP.fullmatch(line)
        color = [int(match[i]) for i in (2, 3, 4)] if match else [256]
        if match is None or max(color) > 255:
            raise UserError(
                f"{shown(path)}:{number}: {line[:200]!r}; a line is `name:R,G,B:parts:actions`"
            )
        rows.append((number, f"#{bytes(color).hex()}: {match[1]}"))
    return _class_list(path, rows)


def _class_list(path: Path, rows: list[tuple[int, str]]) -> ClassList:
    """Makes the class list of a file's lines, given with their numbers and without comments."""
    classes: list[ClassInfo] = []
    lines: dict[int, int] = {}  # value -> line
    ignored: list[int] = []
    kinds = set()
    for place, (number, line) in enumerate(rows):
        where = f"{shown(path)}:{number}"
        text, names = _parts(line, where, first=place == 0)

        # Two lines must not give one value two meanings.
        value, kind = _value(text, place)
        if MOST < value < COLOR:
            raise UserError(f"{where}: {value}; masks hold values up to {MOST}")
        kinds.add(kind)
        if value in lines:
            raise UserError(f"{where}: {written(value)} is line {lines[value]}'s already")
        lines[value] = number

        # An ignored value gets no id: the ids of the classes stay consecutive.
        if names[0].lower() == "ignore":
            ignored.append(value)
        else:
            classes.append(ClassInfo(names[0], tuple(names[1:]), (value,), _rgb(value), names[0]))

    _check(path, classes, kinds)
    return ClassList(tuple(classes), tuple(ignored), kinds.pop())


def written(value: int) -> str:
    """A value as the list writes it."""
    return f"#{value - COLOR:06x}" if value >= COLOR else str(value)


def _parts(line: str, where: str, *, first: bool) -> tuple[str | None, list[str]]:
    """Splits a line into its value (as written; None without one) and its names.

    Args:
      line: without the white space around it.
      where: file and line number, for the message.
      first: True for the first line, where tables have their headings.

    Raises:
      UserError: the line does not follow the grammar.
    """
    if len(line) > LONGEST:
        raise UserError(f"{where}: {len(line)} characters, more than {LONGEST}; {FORM}")
    match = _LINE.fullmatch(line)
    # One form for each name: other kinds of space, and of accents, would make another word of it.
    plain = unicodedata.normalize("NFC", match["names"]) if match else ""
    names = [" ".join(name.split()) for name in plain.split(",")]
    if match is None or not all(names):
        raise UserError(f"{where}: {line[:200]!r}; {FORM}")

    # After a colon a name may begin with a digit: `3: 2 story house`.
    text = match["names"].strip()
    for pattern, why in _FOREIGN[match["value"] is not None :]:
        if pattern.match(text):
            raise UserError(f"{where}: {line[:200]!r}: {why}; {FORM}")

    # A class may be called "red": a single word is a heading only if it can mean nothing else.
    words = {n.lower() for n in names}
    if first and words <= (_HEADINGS if len(words) > 1 else _ALONE):
        raise UserError(f"{where}: {line[:200]!r} is the heading of a table; {FORM}")
    return match["value"], names


def _value(text: str | None, place: int) -> tuple[int, str]:
    """Value of a line and its kind; a line without a value has its place as value."""
    if text is None:
        return place, "no value"
    if text.startswith("#"):
        return COLOR + int(text[1:], 16), "color"
    return int(text), "number"


def _rgb(value: int) -> tuple[int, int, int] | None:
    """The color (R, G, B) that a value stands for; None for a plain number."""
    if value < COLOR:
        return None
    _, red, green, blue = value.to_bytes(4, "big")
    return red, green, blue


def _check(path: Path, classes: list[ClassInfo], kinds: set[str]) -> None:
    """Checks that there are classes, all lines have one form, and no name occurs twice.

    Raises:
      UserError: names the file.
    """
    if not classes:
        raise UserError(f"{shown(path)}: names no class")
    if len(kinds) > 1:
        raise UserError(
            f"{shown(path)}: lines with {' and with '.join(sorted(kinds))}; use one form for all lines"
        )

    # A word with two meanings cannot be a query.
    words = Counter(w.lower() for c in classes for w in (c.name, *c.synonyms))
    twice = sorted(word for word, count in words.items() if count > 1)
    if twice:
        raise UserError(f"{shown(path)}: {twice[0]!r} is named twice")
