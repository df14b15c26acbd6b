# SPDX-License-Identifier: Apache-2.0
"""COCO run-length masks: runs of 0 and 1 down the columns, as a list or packed as text."""

from __future__ import annotations

import numpy as np

from digseg_jax.arraytypes import Bool, Int


def decode(counts: str | list[int], height: int, width: int) -> np.ndarray:
    """Decodes runs to a mask, bool [h, w].

    Raises:
      ValueError: the runs do not fill the mask, or are not runs.
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


def encode(mask: Bool[np.ndarray, "h w"]) -> str:
    """Encodes a mask in COCO's text form; `decode` returns the same mask."""
    # Positions down the columns where the value changes; the first run is one of zeros.
    values = mask.T.ravel()
    changes = np.flatnonzero(values[1:] != values[:-1]) + 1
    first = np.zeros(int(values[0]), np.int64)
    return pack(np.diff(np.concatenate([[0], first, changes, [values.size]])))


def pack(runs: Int[np.ndarray, " n"]) -> str:
    """Packs run lengths into COCO's text form; the inverse of `unpack`."""
    rest = runs.astype(np.int64)
    rest[3:] -= runs[1:-2]

    # A column of characters at a time: 5 bits of every number, and whether more of them follow. They
    # end where only the sign of the last 5 is left. 0 stands for no character.
    columns, open_ = [], np.ones(len(rest), bool)
    while open_.any():
        bits = rest & 31
        rest >>= 5
        more = rest != np.where(bits & 16, -1, 0)
        columns.append(np.where(open_, 48 + bits + 32 * more, 0).astype(np.uint8))
        open_ &= more
    text = np.stack(columns, axis=1).ravel()
    return text[text > 0].tobytes().decode("ascii")
