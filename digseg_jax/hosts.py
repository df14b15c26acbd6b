# SPDX-License-Identifier: Apache-2.0
"""Arrays between one process's memory and the devices of all: rows of an evaluation, and back again."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from digseg_jax.distributed import is_main
from digseg_jax.sharding import BATCH


def place_rows(
    read: Callable[[int], dict[str, np.ndarray]], count: int, mesh: Mesh
) -> dict[str, jax.Array]:
    """A global batch of the rows read(0) .. read(count - 1); each process reads only its own."""
    sharding = NamedSharding(mesh, BATCH)
    rows: dict[int, dict[str, np.ndarray]] = {}
    for index in sharding.addressable_devices_indices_map((count,)).values():
        for i in range(*index[0].indices(count)):
            if i not in rows:
                rows[i] = read(i)

    def put(name: str, like: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            return np.stack([rows[i][name] for i in range(*index[0].indices(count))])

        return jax.make_array_from_callback((count, *np.shape(like)), sharding, shard)

    return {name: put(name, like) for name, like in next(iter(rows.values())).items()}


def fetch(x: jax.Array) -> np.ndarray:
    """The whole array in this process's memory; every process must ask."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0))
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def fetch_to_main(tree: Any) -> Any:
    """The whole tree on process 0, None on the others; leaf by leaf, so that no device holds it all."""
    leaves, structure = jax.tree.flatten(tree)
    fetched = []
    for leaf in leaves:
        value = fetch(leaf)
        fetched.append(value if is_main() else None)
    return structure.unflatten(fetched) if is_main() else None


def tell_all(value: Any) -> Any:
    """Process 0's JSON-ready value on every process; every process must come."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    # two rounds, since the arrays of a broadcast have one shape on all processes
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size if is_main() else 0)))
    told = multihost_utils.broadcast_one_to_all(text if is_main() else np.zeros(size, np.uint8))
    return json.loads(np.asarray(told).astype(np.uint8).tobytes())
