# SPDX-License-Identifier: Apache-2.0
"""Names of files that are made from other texts, so that no two of them are one file."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

LONGEST = 100  # bytes of a part of a file name; a whole one has at most 255


def slug(text: str) -> str:
    """A text as part of a file name: letters and digits in lower case, `_` for all else."""
    made = "".join(c if c.isalnum() else "_" for c in text.strip().lower())
    return made.encode("utf-8", errors="replace")[:LONGEST].decode("utf-8", errors="ignore")


def key(name: str) -> str:
    """What two names share that are one file where case and Unicode's forms do not count."""
    return unicodedata.normalize("NFC", name).casefold()


def distinct(names: Iterable[str]) -> list[str]:
    """The names in their order; one whose key was there before gets _2, _3, ... at its end."""
    made, taken = [], set[str]()
    for name in names:
        candidate, number = name, 2
        while key(candidate) in taken:
            candidate, number = f"{name}_{number}", number + 1
        taken.add(key(candidate))
        made.append(candidate)
    return made
