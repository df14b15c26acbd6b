# SPDX-License-Identifier: Apache-2.0
"""Names of splits: "val" also finds a split that its data set calls "valid" or "validation"."""

from __future__ import annotations

from collections.abc import Iterable

# Names that mean the same split, each group in the order of preference.
_SAME = (
    ("train", "training"),
    ("val", "valid", "validation", "dev"),
    ("test", "testing"),
)


def split_called(name: str, splits: Iterable[str]) -> str:
    """The name that a data set has for a split; a name that matches none is returned as it is."""
    known = list(splits)
    if name in known:
        return name

    # An unknown name is for the caller to reject: it knows the legal ones.
    same = next((group for group in _SAME if name in group), ())
    return next((other for other in same if other in known), name)
