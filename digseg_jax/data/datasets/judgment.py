# SPDX-License-Identifier: Apache-2.0
"""Judges the counts of a split's labels: whether a run on them would be pointless, and the cure."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from digseg_jax.data.datasets.spec import DatasetSpec

MUCH_IGNORED = 0.5  # share of ignored pixels from which a warning is due
VOID = 255  # ignored by convention, but also what tools write for the only class of a mask


class Finding(NamedTuple):
    """One line about a split; `wrong` means that training or testing on it would be pointless."""

    text: str
    wrong: bool


def judge(spec: DatasetSpec, pixels: np.ndarray, ignored: int, examples: int) -> list[Finding]:
    """Judges what was counted in the labels of a split; a wrong finding comes alone.

    Args:
      spec: the data set's classes and ignore rule.
      pixels: number of pixels of each class, int [c].
      ignored: number of pixels without a class.
      examples: number of examples that were counted.
    """
    # With one class, or none, there is nothing to learn whatever the counts are.
    if not examples:
        return [Finding("no example", wrong=True)]
    if spec.num_classes == 1:
        text = (
            f"{spec.names[0]!r} is the only class, so that every mask is full: name the rest too, as "
            "in `0: background`"
        )
        return [Finding(text, wrong=True)]

    # Labels in which every counted pixel is of one class, or ignored.
    counted, total = f"{examples} examples", int(pixels.sum()) + ignored
    shown = np.flatnonzero(pixels)
    absent = [name for name, count in zip(spec.names, pixels, strict=True) if not count]
    hint = _hint(spec, absent) if ignored else ""
    if not len(shown):
        return [Finding(f"every pixel of {counted} is ignored ({spec.ignore}){hint}", wrong=True)]
    if len(shown) == 1:
        text = f"every pixel of {counted} that counts is {spec.names[shown[0]]!r}{hint}"
        return [Finding(text, wrong=True)]

    # The rest may be meant so: rare classes are absent from small splits, borders are ignored.
    found = []
    if absent:
        found.append(Finding(f"no pixel in {counted}: {_list(absent)}{hint}", wrong=False))
    if ignored > MUCH_IGNORED * total:
        text = f"{100 * ignored / total:.0f} % of the pixels are ignored ({spec.ignore}){hint}"
        found.append(Finding(text, wrong=False))
    return found


def _hint(spec: DatasetSpec, absent: list[str]) -> str:
    """Advice for masks of 0 and 255 where the user's own class list gives 255 no class; "" otherwise.

    absent: names of the classes without a pixel.
    """
    if spec.name != "folder" or VOID not in spec.ignored_raw or not absent:
        return ""
    return (
        f"; 255 is ignored: if it is {absent[-1]!r} in the masks, write `255: {absent[-1]}` into "
        "classes.txt, and values before all other lines"
    )


def _list(names: list[str], most: int = 8) -> str:
    """Joins names for a message; of many only the first `most`, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
