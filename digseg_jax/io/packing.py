# SPDX-License-Identifier: Apache-2.0
"""Joins the small arrays of a train state for storing, and splits them again.

Every stored array costs a millisecond or two of processor time and, in a bucket, requests of its own,
and most arrays of these networks are biases and scales. Small arrays, which no device shards, are
therefore joined, one array per entry of the state and type: {"params": tree} becomes {"params":
{"large": tree of the others, "small": {"float32": [n]}}}. `layout` records which arrays a joined one is
made of.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from digseg_jax.arraytypes import Array
from digseg_jax.runtime.sharding import FSDP_MIN_SIZE, place
from digseg_jax.trees import flatten, unflatten

Leaves = dict[str, Any]  # path -> array, or shape of one


def layout(state: dict[str, Any]) -> dict[str, dict[str, list]]:
    """{entry: {path of a small array: [type, *shape]}}, in the order of the joined array; for JSON."""
    return {
        entry: {path: [x.dtype.name, *x.shape] for path, x in _small(_leaves(tree)).items()}
        for entry, tree in state.items()
    }


def pack(state: dict[str, Any]) -> dict[str, Any]:
    """Joins the small arrays of each entry of the state; large arrays stay the same objects."""
    return {entry: _packed(_leaves(tree), _joined) for entry, tree in state.items()}


def abstract_packed(abstract: dict[str, Any]) -> dict[str, Any]:
    """Does for ShapeDtypeStructs with shardings what `pack` does for arrays."""

    def joined(xs: list[Any]) -> jax.ShapeDtypeStruct:
        total = sum(math.prod(x.shape) for x in xs)
        return jax.ShapeDtypeStruct((total,), xs[0].dtype, sharding=_replicated(xs))

    return {entry: _packed(_leaves(tree), joined) for entry, tree in abstract.items()}


def unpack(stored: dict[str, Any], abstract: dict[str, Any]) -> dict[str, Any]:
    """Splits what `pack` joined; each leaf gets the type, shape and sharding of its abstract leaf.

    Args:
      stored: the packed state, {entry: {"large": tree, "small": {type: [n]}}}.
      abstract: ShapeDtypeStructs of the state's entries, in the layout of the stored ones.
    """
    state = {}
    for entry, tree in abstract.items():
        leaves = _leaves(tree)
        found = flatten(stored[entry].get("large", {}))

        # Cut each joined array in the order of `layout`.
        for dtype, group in _by_type(_small(leaves)).items():
            found |= _cut(stored[entry]["small"][dtype], group)

        # Back into the tree, in the order of its own leaves.
        state[entry] = jax.tree.unflatten(jax.tree.structure(tree), [found[p] for p in leaves])
    return state


def _leaves(tree: Any) -> Leaves:
    """Leaves by their path, such as "0.mu.conv_in.kernel"; "value" for a tree that is a single leaf."""
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
    return {name(path) or "value": x for path, x in pairs}


def _small(leaves: Leaves) -> Leaves:
    """Leaves below the size from which `runtime.sharding` splits an array over devices."""
    return {path: x for path, x in leaves.items() if math.prod(x.shape) < FSDP_MIN_SIZE}


def _by_type(leaves: Leaves) -> dict[str, Leaves]:
    """Leaves grouped by the name of their type, order kept."""
    groups: dict[str, Leaves] = {}
    for path, x in leaves.items():
        groups.setdefault(x.dtype.name, {})[path] = x
    return groups


def _packed(leaves: Leaves, join: Any) -> dict[str, Any]:
    """One entry as it is stored, small leaves joined by `join`; a part without arrays is left out."""
    small = _small(leaves)
    large = {path: x for path, x in leaves.items() if path not in small}

    joined = {dtype: join(list(group.values())) for dtype, group in _by_type(small).items()}
    parts = {"large": unflatten(large), "small": joined}
    return {name: part for name, part in parts.items() if part}


def _joined(xs: list[Array]) -> Array:
    """All elements of the arrays in one, [n], replicated."""
    return _joiner(_replicated(xs))(xs)


def _replicated(xs: Iterable[Any]) -> Sharding | None:
    """Sharding of a joined array: replicated over the arrays' mesh; without a mesh, the first one's."""
    # Host arrays have no sharding, and a single device's has no mesh.
    places = [getattr(x, "sharding", None) for x in xs]
    mesh = next((p.mesh for p in places if isinstance(p, NamedSharding)), None)
    return places[0] if mesh is None else NamedSharding(mesh, P())


@functools.cache
def _joiner(sharding: Sharding | None) -> Any:
    """A jitted function that joins arrays; cached, so that saving does not compile each time."""
    return jax.jit(lambda xs: jnp.concatenate([x.reshape(-1) for x in xs]), out_shardings=sharding)


def _cut(joined: Array, wanted: Leaves) -> Leaves:
    """Cuts a joined array into its arrays, on the host, and places them like `wanted`.

    A compiled program with as many results takes longer than reading the whole checkpoint: Stable
    Diffusion has a thousand of them.
    """
    values = np.asarray(joined.addressable_data(0))  # every device holds it whole

    ends = np.cumsum([math.prod(x.shape) for x in wanted.values()])
    parts = np.split(values, ends[:-1])
    shaped = {path: p.reshape(x.shape) for p, (path, x) in zip(parts, wanted.items(), strict=True)}
    return {path: _placed(part, wanted[path].sharding) for path, part in shaped.items()}


def _placed(part: np.ndarray, sharding: Sharding | None) -> Array:
    """Places a host array on the devices of its sharding; on the default device if there is none."""
    return jnp.asarray(part) if sharding is None else place(part, sharding)
