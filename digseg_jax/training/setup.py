# SPDX-License-Identifier: Apache-2.0
"""Builds a configuration's task for this machine's devices, and the mesh it runs on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from digseg_jax.config.schema import Config
from digseg_jax.runtime.interrupts import check_interrupts
from digseg_jax.runtime.sharding import make_mesh
from digseg_jax.training.mesh_choice import choose_mesh
from digseg_jax.training.tasks.autoencoder import AutoencoderTask
from digseg_jax.training.tasks.base import Task
from digseg_jax.training.tasks.parts import for_devices
from digseg_jax.training.tasks.prior import PriorTask
from digseg_jax.training.tasks.segmentation import load_task

TASKS: dict[str, Callable[[Config], Task]] = {
    "segmentation": load_task,
    "prior": PriorTask,
    "autoencoder": AutoencoderTask,
}


@dataclasses.dataclass(frozen=True)
class Setup:
    """A configuration made concrete: the start of training, evaluation, export and replay.

    config: with the kernels that `auto` stands for on these devices.
    task: with its frozen parts loaded.
    mesh: of all devices.
    """

    config: Config
    task: Task
    mesh: Mesh


def set_up(config: Config) -> Setup:
    """Builds the configuration's task for the devices that JAX has; every process must call it.

    Raises:
      UserError: weights or data are missing, or the mesh does not fit the devices.
    """
    devices = jax.devices()
    config = for_devices(config, devices)

    # The task first: the choice of the mesh needs the shapes of its state.
    task: Task = TASKS[config.task](config)
    check_interrupts()
    return Setup(config, task, make_mesh(choose_mesh(config, task, devices)))
