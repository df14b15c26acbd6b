# SPDX-License-Identifier: Apache-2.0
"""`config.mesh.fsdp=0`: over how many devices the state is split, from the chip and how many there are.

The rule is that of measured compilations (aot/RECORD.md). A state of a gigabyte and more is split over
the devices that fast links join, a TPU slice or the GPUs of a host, up to 16 of them: an update then
reads and writes a part of the moments and averages instead of all, which saves more time than the
gathers take, and beyond 16 the gradients' sums cost more than they save. It is split over more where it
would not fit otherwise. Where no fast link is known of, it is split only as far as it must be to fit.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from digseg_jax.config.schema import Config, MeshConfig
from digseg_jax.log import log
from digseg_jax.models.unet import UNetConfig
from digseg_jax.runtime.hardware import Chip, chip_of
from digseg_jax.training.step import abstract_state
from digseg_jax.training.tasks.base import Task

GB = 1e9
SMALL = 1 * GB  # a state below it is held whole by every device
WIDE = 16  # devices that one state is split over where links are fast, if it fits
# of a device's memory: what JAX takes of a GPU's, and on others room for what the estimate leaves out
USABLE = 0.75
# Bytes of activations for a mask's latent cell: Stable Diffusion's train step at 512 pixels, 4 images
# of 4 masks a chip, bfloat16, blocks rematerialised (aot/RECORD.md). Other modes against that one.
CELL_BYTES, CELL_CHANNELS = 85e3, 320
KEPT = {"block": 1.0, "large": 1.3, "dots": 1.55, "attention": 2.1, "none": 2.1}


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes of a train step: state and gradients on all devices that share them, the rest on each.

    state: parameters, moments and average, with gradients. frozen: autoencoder, prompts. Both are split
    over fsdp. temporaries: an estimate, of one device's images.
    """

    state: float
    frozen: float
    temporaries: float

    def on_a_device(self, fsdp: int) -> float:
        return (self.state + self.frozen) / fsdp + self.temporaries


def chosen(
    config: Config,
    task: Task,
    devices: list[jax.Device],
    memory: float | None = None,
    chip: Chip | None = None,
) -> MeshConfig:
    """The configuration's mesh, its fsdp in place of 0; tells in one line which and why.

    memory: bytes of a device; by default the chip's, where nothing is known of it the least that a
      process finds. The answer is the same on all processes: each must ask.
    chip: what the devices stand for; by default what they are.
    """
    mesh = config.mesh
    if mesh.fsdp != 0:
        return mesh
    if mesh.data != -1:
        return dataclasses.replace(mesh, fsdp=-1)  # there is no choice left

    chip = chip or chip_of(devices[0].device_kind)
    memory = memory or (chip.hbm_bytes if chip else least_memory(devices))
    needs = needs_of(config, task, max(len(devices) // mesh.tensor, 1))
    group = joined(devices) // mesh.tensor
    fsdp = fsdp_for(needs, chip, group, memory * USABLE)

    share, held = needs.on_a_device(fsdp), needs.state + needs.frozen
    over = "" if share <= USABLE * memory else "; it may not fit: raise config.train.accumulation"
    log.info(
        "config.mesh.fsdp=0: %d chosen for %d x %s: of %.2f GB (state, gradients, frozen parts) a "
        "device holds %.2f GB, about %.2f GB with activations, of %.1f GB%s",
        fsdp, len(devices), chip.kind if chip else devices[0].device_kind,
        held / GB, held / fsdp / GB, share / GB, memory / GB, over,
    )  # fmt: skip
    return dataclasses.replace(mesh, fsdp=fsdp)


def fsdp_for(needs: Needs, chip: Chip | None, group: int, budget: float) -> int:
    """Of the divisors of `group`, by the rule of the module; the widest where none fits."""
    if needs.state < SMALL:
        return 1
    sizes = [size for size in range(1, group + 1) if group % size == 0] or [1]
    if chip is not None and chip.ici_bandwidth:
        least = max(size for size in sizes if size <= WIDE)
        sizes = [size for size in sizes if size >= least]
    return next((size for size in sizes if needs.on_a_device(size) <= budget), sizes[-1])


def needs_of(config: Config, task: Task, shards: int) -> Needs:
    """Of the train step; shards: parts that its batch is split into."""
    state, params = _bytes(abstract_state(task.abstract, config)), _bytes(task.abstract)
    images = math.ceil(config.train.batch_size / (shards * config.train.accumulation))
    return Needs(state + params, _bytes(task.frozen), images * activation_bytes(config, task))


def activation_bytes(config: Config, task: Task) -> float:
    """An estimate for one image of the train step; 0 for a task without a U-Net, which is small."""
    unet: UNetConfig | None = getattr(task, "unet_config", None)
    if unet is None:
        return 0.0
    masks = config.data.num_queries if getattr(task, "codec", "") == "binary" else 1
    cells = masks * (config.data.image_size // task.vae.config.factor) ** 2
    width = unet.block_out_channels[0] / CELL_CHANNELS * np.dtype(config.model.dtype).itemsize / 2
    return CELL_BYTES * cells * width * KEPT[config.model.remat]


def joined(devices: list[jax.Device]) -> int:
    """Devices that fast links join: those of the smallest TPU slice, or host of other devices."""
    platform = devices[0].platform

    def group(device: jax.Device) -> int:
        if platform == "cpu":
            return device.process_index
        alone = 0 if platform == "tpu" else device.process_index
        return getattr(device, "slice_index", alone)

    return math.gcd(*collections.Counter(map(group, devices)).values())


def least_memory(devices: list[jax.Device]) -> float:
    """Bytes of the device with the least memory, on all processes; simulated ones share a host's."""
    own = [d for d in devices if d.process_index == jax.process_index()] or devices
    stats = own[0].memory_stats() or {}
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / len(own)
    found = float(stats.get("bytes_limit", host))
    if jax.process_count() == 1:
        return found
    return float(np.min(multihost_utils.process_allgather(np.float32(found))))


def _bytes(tree: Any) -> float:
    return float(sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)))
