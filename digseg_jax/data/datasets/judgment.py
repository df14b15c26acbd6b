# SPDX-License-Identifier: Apache-2.0
"""What the counts of a split's labels say: whether a run on them would be pointless, and the cure."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from digseg_jax.data.datasets.spec import DatasetSpec

MUCH_IGNORED = 0.5  # share of the pixels
VOID = 255  # what tools write for the only class of a mask, and what is ignored by convention


class Finding(NamedTuple):
    """One line about a split. wrong: training on it, or testing on it, would be pointless."""

    text: str
    wrong: bool


def judge(spec: DatasetSpec, pixels: np.ndarray, ignored: int, examples: int) -> list[Finding]:
    """Judges what was counted in the labels of a split.

    Args:
      pixels: of each class, int [c].
      ignored: pixels of no class.
      examples: that were counted.
    """
    if not examples:
        return [Finding("no example", wrong=True)]
    if spec.num_classes == 1:
        text = (
            f"{spec.names[0]!r} is the only class, so that every mask is full: name the rest too, as "
            "in `0: background`"
        )
        return [Finding(text, wrong=True)]

    counted, total = f"{examples} examples", int(pixels.sum()) + ignored
    shown = np.flatnonzero(pixels)
    absent = [name for name, count in zip(spec.names, pixels, strict=True) if not count]
    hint = _hint(spec, absent) if ignored else ""
    if not len(shown):
        return [Finding(f"every pixel of {counted} is ignored ({spec.ignore}){hint}", wrong=True)]
    if len(shown) == 1:
        text = f"every pixel of {counted} that counts is {spec.names[shown[0]]!r}{hint}"
        return [Finding(text, wrong=True)]

    found = []
    if absent:
        found.append(Finding(f"no pixel in {counted}: {_list(absent)}{hint}", wrong=False))
    if ignored > MUCH_IGNORED * total:
        text = f"{100 * ignored / total:.0f} % of the pixels are ignored ({spec.ignore}){hint}"
        found.append(Finding(text, wrong=False))
    return found


def _hint(spec: DatasetSpec, absent: list[str]) -> str:
    """The line that would cure masks of 0 and 255, where the user's own list gives 255 no class."""
    if spec.name != "folder" or VOID not in spec.ignored_raw or not absent:
        return ""
    return (
        f"; 255 is ignored: if it is {absent[-1]!r} in the masks, write `255: {absent[-1]}` into "
        "classes.txt, and values before all other lines"
    )


def _list(names: list[str], most: int = 8) -> str:
    """Names, the first few of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
