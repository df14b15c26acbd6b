# SPDX-License-Identifier: Apache-2.0
"""Tables of a page as data; viz/parts.html.j2 draws them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from digseg_jax.viz.templates import is_number


@dataclasses.dataclass(frozen=True)
class Number:
    """A cell with a number, rounded for reading; a dash for what is none.

    Attributes:
      digits: decimals of a float; None: as many as show three significant digits.
      best: set in bold.
    """

    value: Any
    digits: int | None = 3
    best: bool = False
    kind: ClassVar[str] = "number"


@dataclasses.dataclass(frozen=True)
class Name:
    """A cell with a text behind a dot in a color, or with a link."""

    text: str
    color: str = ""
    link: str = ""
    kind: ClassVar[str] = "name"


Cell = str | Number | Name


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns and rows, with a caption above (its title in bold, or plain) and a note below.

    Raises:
      ValueError: a row has more or fewer cells than there are columns.
    """

    columns: Sequence[Any]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    title: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows, start=1):
            if len(row) != len(self.columns):
                raise ValueError(f"row {number} has {len(row)} cells, not {len(self.columns)}")

    @property
    def numeric(self) -> list[bool]:
        """Of each column, whether any of its cells is a number."""
        return [
            any(isinstance(cell, Number) and is_number(cell.value) for cell in column)
            for column in zip(*self.rows, strict=True)
        ] or [False] * len(self.columns)


def cell_of(value: Any) -> Cell:
    """The cell of a value from a JSON file: numbers and missing ones are shown as such."""
    return Number(value, None) if value is None or is_number(value) else str(value)
