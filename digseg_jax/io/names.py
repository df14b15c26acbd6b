# SPDX-License-Identifier: Apache-2.0
"""Makes file names from other texts, so that no two of them name the same file."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

LONGEST = 100  # bytes of a part of a file name; most file systems allow 255 for the whole name


# Control characters, and those that look like nothing but make another text: soft hyphens, spaces
# without width, marks of direction, fillers, tags, byte-order marks, variants of letters. Also halves
# of characters, which no file can hold. Joiners are legal, as some scripts need them, and so are the
# marks of variants behind the symbols that emoji are made of.
UNSEEN = re.compile(
    "[\\x00-\\x1f\\x7f-\\x9f\\u00ad\\u034f\\u061c\\u115f\\u1160\\u17b4\\u17b5\\u180b-\\u180f\\u200b\\u200e\\u200f"
    "\\u2028-\\u202e\\u2060-\\u206f\\u3164\\ud800-\\udfff\\ufeff\\uffa0\\ufff9-\\ufffb\\U000e0000-\\U000e0fff]"
    "|(?<![#*0-9\\u203c-\\u3299\\U0001f000-\\U0001faff])[\\ufe00-\\ufe0f]"
)


def slug(text: str) -> str:
    """Makes a part of a file name from a text: letters and digits in lower case, `_` for all else."""
    made = "".join(c if c.isalnum() else "_" for c in text.strip().lower())

    # Cut by bytes, as file systems count; a character that is cut in two is dropped.
    return made.encode("utf-8", errors="replace")[:LONGEST].decode("utf-8", errors="ignore")


def key(name: str) -> str:
    """Key of a name: equal for two names that some file systems take for one file.

    macOS and Windows ignore the case; macOS also ignores Unicode's normalization forms.
    """
    return unicodedata.normalize("NFC", name).casefold()


def distinct(names: Iterable[str]) -> list[str]:
    """Makes names distinct, in their order: a repeated one gets _2, _3, ... at its end."""
    made, taken = [], set[str]()
    for name in names:
        # A numbered name may be taken as well: count on until one is free.
        candidate, number = name, 2
        while key(candidate) in taken:
            candidate, number = f"{name}_{number}", number + 1
        taken.add(key(candidate))
        made.append(candidate)
    return made
