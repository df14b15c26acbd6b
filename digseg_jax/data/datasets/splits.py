# SPDX-License-Identifier: Apache-2.0
"""Names of splits: a data set may call its validation split as its makers did."""

from __future__ import annotations

from collections.abc import Iterable

_SAME = (
    ("train", "training"),
    ("val", "valid", "validation", "dev"),
    ("test", "testing"),
)


def split_called(name: str, splits: Iterable[str]) -> str:
    """What a data set calls a split: "val" may be `valid` there; a name of no split stays as it is."""
    known = list(splits)
    if name in known:
        return name
    same = next((group for group in _SAME if name in group), ())
    return next((other for other in same if other in known), name)
