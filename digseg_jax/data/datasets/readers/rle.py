# SPDX-License-Identifier: Apache-2.0
"""Decodes COCO run-length masks: runs of 0 and 1 down the columns, as a list or packed as text."""

from __future__ import annotations

import numpy as np


def decode(counts: str | list[int], height: int, width: int) -> np.ndarray:
    """Decodes runs to a mask, bool [h, w].

    Raises:
      ValueError: the runs do not fill the mask, or are no runs.
    """
    runs = unpack(counts) if isinstance(counts, str) else [int(c) for c in counts]
    if any(r < 0 for r in runs) or sum(runs) != height * width:
        raise ValueError(f"the run lengths do not fill {width}x{height} pixels")

    # Runs go down the columns: fill [w, h] and transpose.
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(width, height).T


def unpack(text: str) -> list[int]:
    """Unpacks run lengths from COCO's text form: five bits per character, least significant first.

    From the fourth run on, the difference to the run before the last is stored.

    Raises:
      ValueError: a character that the form does not have, or an incomplete number.
    """
    # `value` collects the bits of one number, `shift` counts them.
    runs: list[int] = []
    value = shift = 0
    for character in text:
        # 6 bits per character: 5 of the number, and whether more of them follow
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(f"no run-length text: {character!r}")

        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:  # more bits of this number follow
            continue
        if bits & 16:  # negative: extend the sign
            value -= 1 << shift

        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0

    if shift:
        raise ValueError("run-length text ends early")
    return runs
