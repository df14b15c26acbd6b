# SPDX-License-Identifier: Apache-2.0
"""Moves arrays and JSON values between one process's memory and all processes or devices."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from digseg_jax.arraytypes import UInt8
from digseg_jax.errors import UserError
from digseg_jax.runtime.distributed import is_main


def local_rows(x: jax.Array) -> np.ndarray:
    """This process's rows of an array that is split along its first axis, in the array's order.

    Rows that several devices hold (along a tensor axis) are returned once.
    """
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def fetch(x: jax.Array) -> np.ndarray:
    """The whole array in this process's memory; every process must call it."""
    # From the cheapest case to the dearest: here already, a copy here, rows on every process.
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0))
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def fetch_to_main(tree: Any) -> Any:
    """The whole tree on process 0, None on the others; every process must call it.

    Gathers leaf by leaf, so that no device ever holds the whole tree.
    """
    leaves, structure = jax.tree.flatten(tree)
    fetched = []
    for leaf in leaves:
        value = fetch(leaf)
        fetched.append(value if is_main() else None)
    return jax.tree.unflatten(structure, fetched) if is_main() else None


def gather_all(value: Any) -> list[Any]:
    """Every process's JSON-ready value, in the order of the processes; every process must call it."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)

    # Two rounds, sizes first: an all-gather needs arrays of one shape on all processes.
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(text.size))).ravel()
    every = np.asarray(multihost_utils.process_allgather(_padded(text, int(sizes.max()))))
    every = every.astype(np.uint8)
    every = every.reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(every, sizes, strict=True)]


def processes_on_this_host() -> int:
    """How many of the run's processes share this one's main memory; every process must call it."""
    return gather_all(socket.gethostname()).count(socket.gethostname())


def tell_all(value: Any) -> Any:
    """Process 0's JSON-ready value on every process; every process must call it."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)

    # Two rounds, the size first: a broadcast needs arrays of one shape on all processes.
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size if is_main() else 0)))
    own = _padded(text if is_main() else text[:0], size)
    received = np.asarray(multihost_utils.broadcast_one_to_all(own)).astype(np.uint8)
    return json.loads(received[:size].tobytes())


def _padded(text: UInt8[np.ndarray, " n"], size: int) -> UInt8[np.ndarray, " m"]:
    """Text in an array with room for `size` bytes.

    Its length is a power of two: every length is a program of its own, which takes time to compile and
    stays in memory, and texts of all sizes are sent.
    """
    array = np.zeros(2 ** max(size - 1, 1).bit_length(), np.uint8)
    array[: text.size] = text
    return array


def check_all_agree(values: Mapping[str, Any]) -> None:
    """Checks that every process has the same JSON-ready values; every process must call it.

    A process with other settings computes other gradients, silently, or waits forever in a step that
    the others never take.

    Raises:
      UserError: on every process, who differs from process 0 in what.
    """
    first, *others = gather_all(dict(values))
    told = [
        f"process {number} has {name}={theirs.get(name)!r}, process 0 has {first.get(name)!r}"
        for number, theirs in enumerate(others, start=1)
        for name in sorted(first.keys() | theirs.keys())
        if theirs.get(name) != first.get(name)
    ]
    if told:
        more = f" (and {len(told) - 5} more)" if len(told) > 5 else ""
        raise UserError(
            f"the processes of this run disagree: {'; '.join(told[:5])}{more}; start the same command "
            "with the same code on every host"
        )
