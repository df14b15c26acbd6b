# SPDX-License-Identifier: Apache-2.0
"""Checksums of arrays on any mesh and of JSON, to find out whether what is read is what was written.

An array's sum is one of integers modulo 2**32: every element's bits times an odd weight that depends on
the element's place in the whole array. Integers add up to the same in any order, so the sum is the same
on every mesh. A weight that is odd has an inverse, so no flipped bit leaves the sum as it was.
"""

from __future__ import annotations

import json
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from digseg_jax.arraytypes import Array, Integer
from digseg_jax.runtime.collectives import gather_all
from digseg_jax.trees import flatten

_SPREAD = 0x9E3779B1  # odd, 2**32 over the golden ratio: neighbors get unlike weights


def array_sums(tree: dict[str, Any]) -> dict[str, int]:
    """Sums of the arrays of a tree by their dotted path; every process must call it, and gets all."""
    parts = {path: _sum_shards(jnp.asarray(x)) for path, x in flatten(tree).items()}
    own = {path: sum(map(int, found)) for path, found in jax.device_get(parts).items()}

    # Added on the host: programs that talk to each other, many at once, stand still on busy CPUs.
    every = gather_all(own)
    return {path: sum(sums[path] for sums in every) % 2**32 for path in own}


def _sum_shards(x: jax.Array) -> list[jax.Array]:
    """Sums of this process's shards of an array; of equal ones over all processes only the first."""
    strides = [math.prod(x.shape[i + 1 :]) for i in range(x.ndim)]
    sums = []
    for shard in (s for s in x.addressable_shards if s.replica_id == 0):
        # Where the shard begins in the flat array of the whole.
        begin = sum((s.start or 0) * stride for s, stride in zip(shard.index, strides, strict=True))

        # Arguments of the compiled program: of constants, XLA would compute and keep all weights.
        factors = np.asarray([f % 2**32 for f in (*strides, begin, _SPREAD)], np.uint32)
        sums.append(_sum_array(shard.data, factors))
    return sums


@jax.jit
def _sum_array(x: Array, factors: Integer[Array, "n"]) -> Integer[Array, ""]:
    """The sum of one shard.

    Args:
      x: its numbers.
      factors: how far apart neighbors along each axis are in the flat array of the whole, where the
        shard begins there, and _SPREAD, all modulo 2**32.
    """
    bits = _bits(x)
    place = jnp.full(bits.shape, factors[-2])
    for dim in range(x.ndim):
        place += lax.broadcasted_iota(jnp.uint32, bits.shape, dim) * factors[dim]

    weight = (place * factors[-1]) | np.uint32(1)
    return jnp.sum(bits * weight, dtype=jnp.uint32)


def _bits(x: Array) -> Integer[Array, "..."]:
    """The bits of an array as 32-bit integers; elements of 64 bits become two, along a last axis."""
    x = jnp.asarray(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)

    # Nothing is rounded on the way: not-a-numbers and the sign of zero keep their bits.
    size = min(x.dtype.itemsize, 4)
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * size}")).astype(jnp.uint32)


def json_sum(value: Any) -> int:
    """CRC-32 of a JSON-ready value, whatever the order of its keys."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())
