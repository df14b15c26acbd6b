# SPDX-License-Identifier: Apache-2.0
"""Builds a configuration's task for this machine's devices, and the mesh it runs on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh

from digseg_jax.arraytypes import Params
from digseg_jax.config.parse import with_settings
from digseg_jax.config.schema import ComputeConfig, Config, MeshConfig
from digseg_jax.data.captions import captions_of
from digseg_jax.log import log
from digseg_jax.runtime.distributed import together
from digseg_jax.runtime.hardware import Chip
from digseg_jax.runtime.interrupts import check_interrupts
from digseg_jax.runtime.sharding import check_batch, make_mesh
from digseg_jax.training.mesh_choice import choose_accumulation, choose_mesh, needs_of
from digseg_jax.training.tasks.autoencoder import AutoencoderTask
from digseg_jax.training.tasks.base import Task, Trainable
from digseg_jax.training.tasks.parts import choose_kernels
from digseg_jax.training.tasks.prior import PriorTask
from digseg_jax.training.tasks.segmentation import SegmentationTask

TASKS: dict[str, Callable[[Config], Task]] = {
    "segmentation": SegmentationTask,
    "prior": lambda config: PriorTask(
        [text for part in captions_of(config.data) for text in part.texts],
        config.unet_arch, config.model, config.compute, config.diffusion,
        size=config.data.image_size, seed=config.seed,
    ),
    "autoencoder": lambda config: AutoencoderTask(
        config.vae_arch, config.compute,
        dtype=config.model.dtype, size=config.data.image_size, seed=config.seed,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices that a run is set up for.

    devices: all of the mesh. meant: those that kernels are chosen for, where `devices` only stand in
    for them. memory: bytes of one device. chip: their kind. None: as the devices say.
    """

    devices: list[jax.Device]
    meant: Sequence[Any]
    memory: float | None = None
    chip: Chip | None = None


T = TypeVar("T", bound=Trainable)


@dataclasses.dataclass(frozen=True)
class Setup(Generic[T]):
    """A configuration made concrete: the start of training, export, replay and compilation.

    config: with the kernels that `auto` stands for on these devices, and a chosen accumulation.
    task: with its frozen parts loaded, or as mere shapes.
    mesh: of all devices.
    """

    config: Config
    task: T
    mesh: Mesh


def set_up(config: Config, build: Callable[[Config], T], machine: Machine | None = None) -> Setup[T]:
    """Builds a task for the devices of a machine, by default this one; every process must call it.

    build: makes the task of a configuration, such as one of `TASKS`.

    Raises:
      UserError: weights or data are missing, or the mesh does not fit the devices.
    """
    machine = machine or Machine(jax.devices(), jax.devices())
    dtype, tensor = config.model.dtype, config.mesh.tensor
    kernels = choose_kernels(config.compute, machine.meant, dtype, tensor)
    config = dataclasses.replace(config, compute=kernels)

    # The task first: the choice of the mesh needs the shapes of its state. A host whose weights are
    # missing, or whose disk is full, tells all of them.
    with together("the weights"):
        task = build(config)
    check_interrupts()
    images = config.train.batch_size / (kernels.accumulation or 1)
    needs_on = partial(needs_of, task, config.optim, images)
    devices, memory, chip = machine.devices, machine.memory, machine.chip
    mesh = make_mesh(choose_mesh(config.mesh, needs_on, devices, memory, chip), devices)
    if not kernels.accumulation:
        parts = choose_accumulation(config.train.batch_size, needs_on, mesh, memory, chip)
        config = with_settings(config, {"compute.accumulation": parts})
    return Setup(config, task, mesh)


def check_batch_size(batch_size: int, compute: ComputeConfig, mesh: MeshConfig) -> None:
    """Checks that this machine's devices divide a step's batch; before `set_up` loads any weights.

    Raises:
      UserError: they do not, or the mesh does not fit them.
    """
    # Data and fsdp together split the batch: the parts are the same whatever fsdp will be chosen.
    if mesh.fsdp == 0 and mesh.data != -1:
        mesh = dataclasses.replace(mesh, fsdp=-1)
    parts = compute.accumulation or 1
    check_batch("config.train.batch_size", batch_size, make_mesh(mesh), parts)


def log_summary(task: Task, mesh: Mesh) -> None:
    """Logs the task's trainable and frozen parameters, and the mesh."""
    log.info("trainable parameters:\n%s", _overview(task.abstract))
    sizes = [f"{name} {_millions(tree)}" for name, tree in task.frozen.items()]
    log.info("frozen, in millions of numbers: %s", ", ".join(sizes) or "nothing")
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    log.info("mesh of %d x %s: %s", mesh.size, jax.devices()[0].device_kind, axes)


def _overview(params: Params) -> str:
    """Table of parameters by top-level module, as the full table of a U-Net has 700 rows."""
    groups = {name: parameter_overview.count_parameters(tree) for name, tree in params.items()}
    rows = [f"  {name:<20} {count:>12,}" for name, count in groups.items()]
    return "\n".join([*rows, f"  {'total':<20} {sum(groups.values()):>12,}"])


def _millions(tree: Params) -> float:
    """Number of elements of a tree, in millions, to two decimals."""
    return round(sum(np.size(x) for x in jax.tree.leaves(tree)) / 1e6, 2)
