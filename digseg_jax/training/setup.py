# SPDX-License-Identifier: Apache-2.0
"""Builds a configuration's task for this machine's devices, and the mesh it runs on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from clu import parameter_overview
from jax.sharding import Mesh

from digseg_jax.arraytypes import Params
from digseg_jax.config.parse import with_settings
from digseg_jax.config.schema import Config
from digseg_jax.log import log
from digseg_jax.runtime.interrupts import check_interrupts
from digseg_jax.runtime.sharding import make_mesh
from digseg_jax.training.mesh_choice import choose_accumulation, choose_mesh, needs_of
from digseg_jax.training.tasks.autoencoder import AutoencoderTask
from digseg_jax.training.tasks.base import Task
from digseg_jax.training.tasks.parts import for_devices
from digseg_jax.training.tasks.prior import PriorTask
from digseg_jax.training.tasks.segmentation import load_task

TASKS: dict[str, Callable[[Config], Task]] = {
    "segmentation": load_task,
    "prior": PriorTask,
    "autoencoder": lambda config: AutoencoderTask(
        config.vae_arch, config.compute,
        dtype=config.model.dtype, size=config.data.image_size, seed=config.seed,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setup:
    """A configuration made concrete: the start of training, evaluation, export and replay.

    config: with the kernels that `auto` stands for on these devices, and a chosen accumulation.
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
    needs_on = partial(needs_of, config, task)
    mesh = make_mesh(choose_mesh(config.mesh, needs_on, devices))
    if not config.compute.accumulation:
        parts = choose_accumulation(config.train.batch_size, needs_on, mesh)
        config = with_settings(config, {"compute.accumulation": parts})
    return Setup(config, task, mesh)


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
