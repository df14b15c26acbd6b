# SPDX-License-Identifier: Apache-2.0
"""Runs parts of a model on each device's own shard: slices of a batch, gathered kernels, attention."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from digseg_jax.arraytypes import Array, Bool, Float
from digseg_jax.models.attention import attention
from digseg_jax.models.kernels.attention import AttentionFn
from digseg_jax.models.kernels.feed_forward import fused
from digseg_jax.runtime.sharding import BATCH, spec_of


def in_slices(function: Callable[[Any], Array], x: Any, limit: int) -> Array:
    """Computes function(x) in slices, one after another, to save memory.

    Slice s has the examples s, s + slices, ...: this splits each device's own part and moves no example
    to another device.

    Args:
      function: maps examples to examples.
      x: an array of examples, or a tree of arrays.
      limit: most examples of a slice on each device; 0: all at once.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else mesh.shape["data"] * mesh.shape["fsdp"]
    count = jax.tree.leaves(x)[0].shape[0]
    local = max(count // shards, 1)
    if not limit or local <= limit or count % shards:
        return function(x)

    # The fewest slices of equal size that respect the limit.
    slices = next(s for s in range(2, local + 1) if local % s == 0 and local // s <= limit)
    parts = jax.tree.map(lambda a: a.reshape(-1, slices, *a.shape[1:]).swapaxes(0, 1), x)
    out = jax.lax.map(function, parts).swapaxes(0, 1)
    return out.reshape(-1, *out.shape[2:])


def gathered(kernel: Array) -> Array:
    """Gathers a kernel over the fsdp axis where it is used, so that every device has all of it.

    Left to itself, XLA sometimes gathers the much larger activations instead. With a tensor axis the
    choice stays with XLA, because the kernel's tensor axis is not known here.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1 or mesh.shape["tensor"] > 1:
        return kernel
    return _whole(kernel, spec_of("", kernel.shape, mesh))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _whole(kernel: Array, spec: P) -> Array:
    """The kernel replicated on every device; its gradient stays sharded as `spec` says."""
    # Sharded first: otherwise XLA gathers the float32 kernel and converts it to bfloat16 afterwards.
    kernel = jax.lax.with_sharding_constraint(kernel, spec)
    return jax.lax.with_sharding_constraint(kernel, P())


def _whole_forward(kernel: Array, spec: P) -> tuple[Array, None]:
    return _whole(kernel, spec), None


def _whole_backward(spec: P, _: None, gradient: Array) -> tuple[Array]:
    # The constraint's own gradient would be replicated: an all-reduce, which moves twice the bytes of
    # the reduce-scatter that is enough for each device's part of the sum.
    return (jax.lax.with_sharding_constraint(gradient, spec),)


_whole.defvjp(_whole_forward, _whole_backward)


def local_feed_forward(x: Float[Array, "b l c"], *weights: Array) -> Float[Array, "b l c"]:
    """Runs `models.kernels.feed_forward.fused` on each device's own examples; see `LocalAttention`.

    Every device has the whole weights; their gradients are summed over the devices.
    """

    def local(x: Array, *weights: Array) -> Array:
        """The kernel on one device's examples; it takes positions [n, c]."""
        return fused(x.reshape(-1, x.shape[-1]), *weights).reshape(x.shape)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(x, *weights)

    # A batch that does not divide is computed whole on each device.
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    spec = P(BATCH[0] if x.shape[0] % shards == 0 else None, None, None)
    in_specs = (spec, *(P() for _ in weights))
    return jax.shard_map(local, in_specs=in_specs, out_specs=spec, check_vma=False)(x, *weights)


@dataclasses.dataclass(frozen=True)
class LocalAttention:
    """Attention where each device computes its own examples and heads, as Pallas kernels require.

    XLA cannot partition the call of a Pallas kernel. The mesh is the one that `on_mesh` traced with;
    without one, as on a single device, nothing is split. A dimension that the mesh axes do not divide
    is computed whole on each device.
    """

    implementation: str | AttentionFn

    def __call__(
        self,
        q: Float[Array, "b l heads d"],
        k: Float[Array, "b m heads d"],
        v: Float[Array, "b m heads d"],
        mask: Bool[Array, "b m"] | None = None,
    ) -> Float[Array, "b l heads d"]:
        def local(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
            return attention(q, k, v, mask, self.implementation)

        arrays = (q, k, v) if mask is None else (q, k, v, mask)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return local(*arrays)

        # Examples over data and fsdp, heads over tensor, where they divide.
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        batch = BATCH[0] if q.shape[0] % shards == 0 else None
        heads = "tensor" if q.shape[2] % mesh.shape["tensor"] == 0 else None

        spec = P(batch, None, heads, None)
        in_specs = (spec, spec, spec, P(batch, None))[: len(arrays)]
        # check_vma=False: a Pallas call does not say over which axes its result varies.
        return jax.shard_map(local, in_specs=in_specs, out_specs=spec, check_vma=False)(*arrays)
