# SPDX-License-Identifier: Apache-2.0
"""Places arrays on devices: one mesh (data x fsdp x tensor), one rule table from paths to specs."""

from __future__ import annotations

import collections
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from digseg_jax.config.schema import MeshConfig
from digseg_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))  # the batch axis is split over both
FSDP_MIN_SIZE = 2**16  # elements; smaller arrays are replicated: gathering costs more than it saves

# Regex on the parameter path -> dimension that the tensor axis splits; the first match wins.
# Pairs of matrices (q, k, v and out; up and down) are split so that one sum joins the results.
TENSOR_RULES: tuple[tuple[str, int], ...] = (
    (r"\.to_[qkv]\.kernel$", 1),
    (r"\.to_out\.0\.kernel$", 0),
    (r"\.ff\.net\.0\.proj\.kernel$", 1),
    (r"\.ff\.net\.2\.kernel$", 0),
)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of a configuration, over all devices by default.

    config.mesh.fsdp=0 counts as 1 here; runs call `training.mesh_choice.choose_mesh` first.

    Raises:
      UserError: the axis sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp or 1, config.tensor]

    # An axis of -1 gets the devices that the others leave.
    fixed = math.prod(s for s in sizes if s != -1)
    if sizes.count(-1) == 1 and fixed > 0 and len(devices) % fixed == 0:
        sizes[sizes.index(-1)] = len(devices) // fixed

    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise UserError(
            f"config.mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor}: does not fit "
            f"{len(devices)} devices; the product must be {len(devices)}, one axis may be -1"
        )

    return Mesh(arranged(devices, sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def arranged(devices: list[jax.Device], sizes: list[int]) -> np.ndarray:
    """The devices as [data, fsdp, tensor], with the fastest links along the inner axes.

    These are a TPU's links to its neighbors, or those among the GPUs of a node. Several TPU slices are
    joined along the data axis, whose one all-reduce per step is what the slow network between them can
    bear. An axis that does not fit into one node of GPUs extends over several.

    Raises:
      UserError: the slices do not divide the data axis.
    """
    # JAX calls a node, or what NVLink joins, a slice too: sorted, its GPUs are neighbors.
    if devices[0].platform in ("gpu", "cuda"):
        devices = sorted(devices, key=lambda d: (getattr(d, "slice_index", 0), d.id))
    if devices[0].platform != "tpu":
        return np.asarray(devices).reshape(sizes)

    slices = len({getattr(d, "slice_index", 0) for d in devices})
    data, *inner = sizes
    if data % slices:
        raise UserError(
            f"config.mesh.data={data}: must be a multiple of the {slices} slices, which only the data "
            "axis may span; make config.mesh.fsdp or tensor smaller"
        )

    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(
        [data // slices, *inner], [slices, 1, 1], devices, allow_split_physical_axes=True
    )


def check_batch(key: str, size: int, mesh: Mesh, accumulation: int = 1) -> None:
    """Raises UserError unless a batch splits into equal parts, `accumulation` per device.

    Args:
      key: of the configuration, for the message.
      size: of the batch, over all hosts.
      mesh: its data and fsdp axes split the batch.
      accumulation: microbatches.

    Raises:
      UserError: names the nearest sizes, and if possible an accumulation, that fit.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = shards * accumulation
    if size % parts == 0:
        return

    near = " or ".join(str(n) for n in nearest_batches(size, parts))
    times = f", times config.compute.accumulation={accumulation}" if accumulation > 1 else ""

    # If the batch fits the devices, another number of microbatches would do as well.
    fewer = ""
    if accumulation > 1 and size % shards == 0:
        legal = [n for n in range(1, size // shards + 1) if size // shards % n == 0]
        best = min(legal, key=lambda n: abs(n - accumulation))
        fewer = f"; or config.compute.accumulation={best}"

    raise UserError(
        f"{key}={size}: must be a multiple of {parts}: {shards} devices along config.mesh.data and fsdp"
        f"{times}; nearest: {near}{fewer}"
    )


def nearest_batches(size: int, parts: int) -> list[int]:
    """The multiples of `parts` next to a size, below and above; only those above 0."""
    below = size // parts * parts
    return [n for n in (below, below + parts) if n > 0]


def spec_of(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """PartitionSpec by path: the tensor axis by rule, then fsdp on the largest dimension it divides."""
    dims: list[str | None] = [None] * len(shape)
    for pattern, dim in TENSOR_RULES:
        if mesh.shape["tensor"] > 1 and re.search(pattern, path) and len(shape) == 2:
            if shape[dim] % mesh.shape["tensor"] == 0:
                dims[dim] = "tensor"
            break

    # Large arrays only; a dimension that the tensor axis has already is left alone.
    fsdp = mesh.shape["fsdp"]
    if fsdp > 1 and math.prod(shape) >= FSDP_MIN_SIZE:
        for dim in sorted(range(len(shape)), key=lambda d: -shape[d]):
            if dims[dim] is None and shape[dim] % fsdp == 0:
                dims[dim] = "fsdp"
                break
    return P(*dims)


def infer_shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A NamedSharding for every leaf (array or ShapeDtypeStruct) of a tree.

    Optimizer moments are sharded like their parameter, because its path is the end of theirs.
    """

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        names = [str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey)]
        return NamedSharding(mesh, spec_of("." + ".".join(names), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def held_share(trees: Iterable[Any], fsdp: int) -> float:
    """Share of the trees' bytes that each of `fsdp` devices holds; more than 1 / fsdp where dimensions
    cannot be split evenly."""
    mesh = AbstractMesh((1, fsdp, 1), AXES)
    whole, held = 0.0, 0.0
    for tree in trees:
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            names = [str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey)]
            is_split = "fsdp" in spec_of("." + ".".join(names), leaf.shape, mesh)
            whole += _bytes(leaf)
            held += _bytes(leaf) / (fsdp if is_split else 1)
    return held / whole if whole else 1.0


def replicated_bytes(tree: Any, shardings: Any) -> dict[str, int]:
    """Bytes of each leaf that every device holds whole, by its path, largest first.

    On one device that is every leaf.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    places = jax.tree.leaves(shardings)
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="."): _bytes(leaf)
        for (path, leaf), place in zip(leaves, places, strict=True)
        if place.is_fully_replicated
    }
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def describe_memory(tree: Any, shardings: Any) -> str:
    """One line for the log: bytes in all, per device, and held whole by every device."""
    leaves = list(zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True))
    total = sum(_bytes(leaf) for leaf, _ in leaves)
    share = sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in leaves)

    whole = replicated_bytes(tree, shardings)
    largest = ", ".join(f"{path} {size / 1e6:.2f} MB" for path, size in list(whole.items())[:2])
    return (
        f"{total / 1e9:.3f} GB in all, {share / 1e9:.3f} GB a device, of which replicated "
        f"{sum(whole.values()) / 1e9:.3f} GB (largest: {largest})"
    )


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


def place(tree: Any, shardings: Any) -> Any:
    """Places host arrays on devices; each process copies only its own shards.

    Args:
      tree: the same host arrays on every process.
      shardings: a tree of the same structure.
    """

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree, shardings)


def data_share(mesh: Mesh) -> tuple[int, int]:
    """(k, n): this process feeds the k-th of n equal parts of every batch.

    n is the number of processes, unless the tensor axis crosses processes: those that hold the same
    rows must be fed the same part.

    Raises:
      UserError: the processes' rows overlap only in part.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]

    # Rows of the batch that each process holds, in units of one shard.
    rows: dict[int, set[int]] = {}
    for device, index in NamedSharding(mesh, BATCH).devices_indices_map((shards,)).items():
        process = device.process_index  # type: ignore[attr-defined]  # jax.Device is no type to mypy
        rows.setdefault(process, set()).add(index[0].start or 0)

    # The distinct sets of rows: each shard must belong to exactly one, and all must be equally large.
    parts = sorted({tuple(sorted(r)) for r in rows.values()})
    if len({len(p) for p in parts}) > 1 or sum(map(len, parts)) != shards:
        raise UserError(
            f"config.mesh {dict(mesh.shape)}: the tensor axis crosses the borders of the {len(rows)} "
            "processes unevenly; it must divide, or be a multiple of, the devices of a process"
        )
    return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays, split over data x fsdp, from this process's part of a batch (`data_share`).

    Args:
      batch: host arrays [rows of this process, ...].
      mesh: of the run.

    Returns:
      Device arrays [rows of all processes, ...].
    """
    sharding, parts = NamedSharding(mesh, BATCH), data_share(mesh)[1]

    def put(rows: np.ndarray) -> jax.Array:
        # The global shape: every process feeds equally many rows.
        shape = (rows.shape[0] * parts, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return {name: put(rows) for name, rows in batch.items()}


def place_ahead(
    batches: Iterable[dict[str, np.ndarray]], mesh: Mesh, depth: int = 2
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, jax.Array]]]:
    """Yields (host batch, device batch), with `depth` transfers in flight.

    The next batch is copied while a step computes.
    """
    placed: collections.deque[tuple[dict[str, np.ndarray], dict[str, jax.Array]]]
    placed = collections.deque()
    for batch in batches:
        placed.append((batch, place_batch(batch, mesh)))
        if len(placed) == depth:
            yield placed.popleft()
    # The last ones, when the stream has ended.
    yield from placed


def on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function to be jitted, so that it is traced with the mesh that `LocalAttention` uses."""

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced
