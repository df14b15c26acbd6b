# SPDX-License-Identifier: Apache-2.0
"""`config.mesh.fsdp=0` and `config.compute.accumulation=0`: chooses over how many devices the state is
split, by chip and device count, and into how many parts a batch, by what is left of their memory.

The rule comes from measured compilations (aot/RECORD.md). Where fast links join the devices (a TPU
slice, or the GPUs of a host), a state of a gigabyte or more is split over up to 16 of them: an update
then reads and writes a part of the moments and averages instead of all, which saves more time than the
gathers take; beyond 16, the sums of the gradients cost more than is saved. It is split over more
devices if it would not fit otherwise. Where no fast link is known, it is split only as far as it must
be to fit.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from digseg_jax.config.schema import MeshConfig, OptimConfig
from digseg_jax.log import log
from digseg_jax.runtime.collectives import processes_on_this_host
from digseg_jax.runtime.cpu import host_memory
from digseg_jax.runtime.hardware import Chip, chip_of
from digseg_jax.runtime.sharding import held_share
from digseg_jax.training.step import abstract_state
from digseg_jax.training.tasks.base import Trainable

GB = 1e9
SMALL = 1 * GB  # bytes; a smaller state is held whole by every device
WORTH = 0.9  # share of what a device held before, below which more devices are worth it
WIDE = 16  # most devices that one state is split over where links are fast, if it fits

# Usable share of a device's memory: on a GPU what JAX allocates of it, on other devices room for what
# the estimate leaves out.
USABLE = 0.75


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes of memory that a train step needs.

    state: parameters, moments and moving average, with gradients; split over fsdp.
    frozen: autoencoder and prompts; split over fsdp.
    temporaries: estimated activations of one device's images; not split.
    gradients: what microbatches need in addition, the sum of their gradients; split over fsdp.
    share: of all that is split, what each of so many devices holds. By default its even part; of real
      arrays more, where the number divides none of their dimensions.
    """

    state: float
    frozen: float
    temporaries: float
    gradients: float = 0.0
    share: Callable[[int], float] = dataclasses.field(default=lambda fsdp: 1 / fsdp, compare=False)

    def on_a_device(self, fsdp: int) -> float:
        """Bytes on one of `fsdp` devices that share the state."""
        return (self.state + self.frozen) * self.share(fsdp) + self.temporaries


def choose_mesh(
    mesh: MeshConfig,
    needs_on: Callable[[int], Needs],
    devices: list[jax.Device],
    memory: float | None = None,
    chip: Chip | None = None,
) -> MeshConfig:
    """The mesh with a chosen fsdp in place of 0; logs in one line which and why.

    Every process must call it: all get the same answer.

    Args:
      mesh: one whose fsdp is not 0, or whose tensor axis has no size, is returned as it is.
      needs_on: what has to fit, by the number of parts that the batch is split into.
      devices: all devices of the mesh.
      memory: bytes of one device. By default the chip's, or for an unknown chip the least that any
        process finds.
      chip: the kind of the devices, to plan for another kind than theirs. By default that of the first.
    """
    if mesh.fsdp != 0 or mesh.tensor < 1:  # the latter is judged by `make_mesh`
        return mesh
    if mesh.data != -1:
        return dataclasses.replace(mesh, fsdp=-1)  # there is no choice left

    # What a device has, and what the step needs. Data and fsdp together split the batch, so its shards
    # are known before fsdp is.
    chip, memory = _facts(devices, memory, chip)
    needs = needs_on(max(len(devices) // mesh.tensor, 1))
    group = count_joined(devices) // mesh.tensor
    fsdp = fsdp_for(needs, chip, group, memory * USABLE)

    # Say what was chosen, from what.
    share, held = needs.on_a_device(fsdp), needs.state + needs.frozen
    over = "" if share <= USABLE * memory else "; smaller parts of a batch: config.compute.accumulation"
    log.info(
        "config.mesh.fsdp=0: %d chosen for %d x %s: of %.2f GB (state, gradients, frozen parts) a "
        "device holds %.2f GB, about %.2f GB with activations, of %.1f GB%s",
        fsdp, len(devices), chip.kind if chip else devices[0].device_kind,
        held / GB, held * needs.share(fsdp) / GB, share / GB, memory / GB, over,
    )  # fmt: skip
    return dataclasses.replace(mesh, fsdp=fsdp)


def choose_accumulation(
    batch_size: int,
    needs_on: Callable[[int], Needs],
    mesh: Mesh,
    memory: float | None = None,
    chip: Chip | None = None,
) -> int:
    """The fewest microbatches with which a batch fits; logs in one line if there is more than one.

    Every process must call it: all get the same answer.

    Args:
      batch_size: images of a step, on all devices.
      needs_on: what has to fit, as in `choose_mesh`; without microbatches.
      mesh: the chosen one.
      memory, chip: as in `choose_mesh`.
    """
    shards, fsdp = mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["fsdp"]
    _, memory = _facts(list(mesh.devices.flat), memory, chip)
    needs = needs_on(shards)

    def held(parts: int) -> float:
        """Bytes on a device."""
        split = dataclasses.replace(needs, temporaries=needs.temporaries / parts)
        return split.on_a_device(fsdp) + (needs.gradients * needs.share(fsdp) if parts > 1 else 0.0)

    # A batch that the devices do not divide is refused elsewhere.
    each = max(batch_size // shards, 1)
    sizes = [parts for parts in range(1, each + 1) if each % parts == 0]
    parts = next((size for size in sizes if held(size) <= USABLE * memory), sizes[-1])

    over = "" if held(parts) <= USABLE * memory else "; it may not fit: see --mode=compile"
    if parts > 1 or over:
        log.info(
            "config.compute.accumulation=0: %d chosen, %d of %d images at a time on a device: about "
            "%.1f of %.1f GB%s",
            parts, each // parts, each, held(parts) / GB, memory / GB, over,
        )  # fmt: skip
    return parts


def _facts(
    devices: list[jax.Device], memory: float | None, chip: Chip | None
) -> tuple[Chip | None, float]:
    """Chip and memory of devices, as far as they are not given."""
    if chip is not None:  # planned for, not there
        return chip, memory or chip.hbm_bytes
    chip = chip_of(devices[0].device_kind)
    if memory or chip is None:
        return chip, memory or least_memory(devices)

    # A device may have less than its kind, or less for this program: a laptop's, a shared one. On a
    # GPU it reports what JAX allocates of it.
    return chip, min(chip.hbm_bytes, least_memory(devices, USABLE * chip.hbm_bytes) / USABLE)


def fsdp_for(needs: Needs, chip: Chip | None, group: int, budget: float) -> int:
    """The divisor of `group` that the module's rule picks; the largest one if none fits.

    Args:
      needs: bytes of the train step.
      chip: kind of the devices; None if unknown.
      group: devices that fast links join.
      budget: usable bytes of one device.
    """
    if needs.state < SMALL:
        return 1

    # Each size that splits the group evenly, ascending. By six a device holds little less than by two,
    # as few dimensions of a network can be divided by it: such sizes are left out.
    sizes: list[int] = []
    for size in range(1, group + 1):
        if group % size == 0 and all(needs.share(size) < WORTH * needs.share(other) for other in sizes):
            sizes.append(size)
    sizes = sizes or [1]

    if chip is not None and chip.ici_bandwidth:
        # Fast links: not less than the widest size up to WIDE, more only to fit.
        least = max(size for size in sizes if size <= WIDE)
        sizes = [size for size in sizes if size >= least]

    return next((size for size in sizes if needs.on_a_device(size) <= budget), sizes[-1])


def needs_of(task: Trainable, optim: OptimConfig, images: float, shards: int) -> Needs:
    """Bytes that the train step needs.

    images: of a batch, or of a microbatch. shards: equal parts that the devices split it into.
    """
    # Gradients have the parameters' shapes, so parameters count twice.
    whole = abstract_state(task.abstract, optim)
    state, params = _bytes(whole), _bytes(task.abstract)
    temporaries = math.ceil(images / shards) * task.activation_bytes()
    share = functools.cache(functools.partial(held_share, (whole, task.frozen)))
    return Needs(state + params, _bytes(task.frozen), temporaries, params, share)


def count_joined(devices: list[jax.Device]) -> int:
    """Number of devices that fast links join: the smallest TPU slice, or host of other devices.

    For groups of unequal sizes it is their greatest common divisor, so that no group of the mesh spans
    two.
    """
    platform = devices[0].platform

    def group(device: jax.Device) -> int:
        """Number of the slice or host that a device belongs to."""
        if platform == "cpu":
            return device.process_index

        # A TPU that belongs to no named slice is in the only
        # one. GPUs without a slice are joined per host.
        alone = 0 if platform == "tpu" else device.process_index
        return getattr(device, "slice_index", alone)

    return math.gcd(*collections.Counter(map(group, devices)).values())


def least_memory(devices: list[jax.Device], otherwise: float = 0.0) -> float:
    """Bytes of the device with the least memory, over all processes; all must call it.

    otherwise: bytes of devices that do not report it; 0: such as are simulated, and share their host's.
    """
    own = [d for d in devices if d.process_index == jax.process_index()] or devices
    stats = own[0].memory_stats() or {}

    here = processes_on_this_host()
    found = float(stats.get("bytes_limit") or otherwise or host_memory() / here / len(own))

    if jax.process_count() == 1:
        return found
    return float(np.min(multihost_utils.process_allgather(np.float32(found))))


def _bytes(tree: Any) -> float:
    """Bytes of all arrays, or shapes of arrays, in a tree."""
    return float(sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)))
