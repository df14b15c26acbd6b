# SPDX-License-Identifier: Apache-2.0
"""Reads MATLAB label files (PASCAL-Context, SBD) without trusting them."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np

from digseg_jax.io.files import UnreadableError, read_bytes

_MAX_UNPACKED = 64 * 2**20  # bytes; a label map here has about one megabyte
_COMPRESSED = 15  # data type of a compressed element (miCOMPRESSED)


def read_mat(path: Path, key: str) -> np.ndarray:
    """Reads the variable `key` of a MATLAB file of version 5.

    Raises:
      UnreadableError: damaged, without that variable, or unpacking to far more than a label map.
    """
    import scipy.io  # here: it takes half a second, and only two data sets need it

    # scipy unpacks without a limit, so the size is checked first.
    data = read_bytes(path, limit=_MAX_UNPACKED)
    _check_unpacked_size(path, data)

    try:
        found = scipy.io.loadmat(io.BytesIO(data), variable_names=[key])
    except Exception as error:  # a damaged file can raise anything from inside the parser
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableError(f"{path}: cannot be read as a MATLAB file: {reason}") from error

    if key not in found:
        raise UnreadableError(f"{path}: holds no variable {key}")
    return found[key]


def label_map(path: Path, value: object) -> np.ndarray:
    """Checks that a variable is a map of whole numbers [h, w], and returns it.

    Raises:
      UnreadableError: another type or number of axes.
    """
    if not isinstance(value, np.ndarray) or value.ndim != 2 or value.dtype.kind not in "ui":
        kind = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value)
        raise UnreadableError(f"{path}: the label is {kind}; expected a map of whole numbers")
    return value


def _check_unpacked_size(path: Path, data: bytes) -> None:
    """Unpacks compressed elements up to the limit, before scipy unpacks them without one.

    Raises:
      UnreadableError: more than _MAX_UNPACKED bytes in all, or damaged.
    """
    # A header of 128 bytes, then elements: kind and size (uint32 each), data.
    position, room = 128, _MAX_UNPACKED
    while position + 8 <= len(data):
        kind = int.from_bytes(data[position : position + 4], "little")
        size = int.from_bytes(data[position + 4 : position + 8], "little")

        if kind == _COMPRESSED:
            # A small file can unpack to gigabytes: stop one byte past the room that is left. (zlib
            # takes a limit of 0 for no limit.)
            unpacker = zlib.decompressobj()
            try:
                room -= len(unpacker.decompress(data[position + 8 :][:size], room + 1))
            except zlib.error as error:
                raise UnreadableError(f"{path}: the MATLAB file is damaged: {error}") from error
            if room < 0:
                raise UnreadableError(f"{path}: unpacks to more than {_MAX_UNPACKED} bytes")

        position += 8 + size
