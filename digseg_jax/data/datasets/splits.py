# SPDX-License-Identifier: Apache-2.0
"""Names of splits: "val" also finds a split that its data set calls "valid" or "Validation"."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Names that mean the same split, each group in the order of preference.
_SAME = (
    ("train", "training"),
    ("val", "valid", "validation", "dev"),
    ("test", "testing"),
)


def split_called(name: str, splits: Iterable[str]) -> str:
    """The name that a data set has for a split; a name that matches none is returned as it is.

    Capitals and a year behind the name do not count: "train" finds Train and train2017.
    """
    known = list(splits)
    if name in known:
        return name

    # An unknown name is for the caller to reject: it knows the legal ones.
    plain = {re.sub(r"[_-]?(19|20)\d\d$", "", split.lower()): split for split in reversed(known)}
    same = next((group for group in _SAME if name in group), ())
    return next((plain[other] for other in same if other in plain), name)
