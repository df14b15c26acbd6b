# SPDX-License-Identifier: Apache-2.0
"""Reads the program's own JSON files, and checks them: anyone may have changed them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from etils import epath

from digseg_jax.errors import UserError
from digseg_jax.io.storage import AnyPath, explained, is_remote

MAX_SIZE = 256 * 2**20  # bytes; a manifest with the statistics of 847 classes has some megabytes
MAX_DEPTH = 40  # levels; a configuration has 4, results 6
Kind = type | tuple[type, ...]  # legal types of a key's value


def read_json(
    path: AnyPath,
    keys: Mapping[str, Kind] | None = None,
    remedy: str = "",
    *,
    nan_as_null: bool = False,
) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
      path: of the file, on a disk or in a bucket.
      keys: keys that it must have, and their types; `float` takes whole numbers too, but no nan.
      remedy: what to do about a bad file, for the message.
      nan_as_null: read nan and infinities, which are no JSON, as null.

    Raises:
      UserError: missing, too large, no JSON, nested too deep, no object, or a key that is missing or of
        another type; in one line with the path.
    """
    # Kind and size first: reading a pipe waits forever, and a file of gigabytes would fill the memory.
    after = f"; {remedy}" if remedy else ""
    with explained(path, "cannot be read"):
        size = epath.Path(path).stat().length
        if not is_remote(path) and not path.is_file():
            raise UserError(f"{path}: not a regular file{after}")
        if size > MAX_SIZE:
            raise UserError(f"{path}: {size} bytes, more than the {MAX_SIZE} that are read{after}")
        data = path.read_bytes()

    try:
        value = parse_object(data, nan_as_null=nan_as_null)
        check_keys(value, keys or {})
    except ValueError as error:
        raise UserError(f"{path}: {error}{after}") from error
    return value


def parse_object(data: bytes | str, *, nan_as_null: bool = False) -> dict[str, Any]:
    """Parses a text of JSON that holds an object; nan_as_null: as in `read_json`.

    Raises:
      ValueError: no JSON, nested too deep, or something else than an object.
    """
    # Python's parser gives up at its own recursion limit, far above MAX_DEPTH.
    try:
        value = json.loads(data, parse_constant=(lambda _: None) if nan_as_null else None)
    except RecursionError as error:
        raise ValueError("nested too deep to be a file of this program") from error
    except ValueError as error:
        raise ValueError(f"not readable as JSON ({error})") from error

    if not isinstance(value, dict):
        raise ValueError(f"holds {type(value).__name__}, expected an object with keys")
    if _deeper(value, MAX_DEPTH):
        raise ValueError("nested too deep to be a file of this program")
    return value


def _deeper(value: Any, limit: int) -> bool:
    """True if anything lies more than `limit` levels down."""
    # Level by level: a recursive function would meet the limit that it checks for.
    level = [value]
    for _ in range(limit):
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level = [item for items in inner for item in items]
        if not level:
            return False
    return any(isinstance(v, dict | list) for v in level)


def check_keys(value: Mapping[str, Any], keys: Mapping[str, Kind]) -> None:
    """Raises ValueError for a key that is missing or of another type."""
    for key, kind in keys.items():
        if key not in value:
            raise ValueError(f"has no key {key!r}")

        found, legal = value[key], kind if isinstance(kind, tuple) else (kind,)
        if float in legal:
            legal += (int,)

        # Python's bool is an int, but true is not a number in JSON.
        wrong = not isinstance(found, legal) or (isinstance(found, bool) and bool not in legal)
        if wrong or (isinstance(found, float) and not math.isfinite(found)):
            names = " or ".join(k.__name__ for k in legal)
            raise ValueError(f"{key!r} is {str(found)[:60]!r}, expected {names}")
