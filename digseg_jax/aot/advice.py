# SPDX-License-Identifier: Apache-2.0
"""Advice after a compilation that went over the memory: what would fit, by the program's numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from digseg_jax.aot import programs
from digseg_jax.aot.shapes import Architecture, UNetTask
from digseg_jax.config.parse import with_settings
from digseg_jax.config.schema import MeshConfig
from digseg_jax.models.remat import MODES
from digseg_jax.runtime.sharding import infer_shardings, make_mesh
from digseg_jax.training.step import abstract_state
from digseg_jax.training.tasks.segmentation import SegmentationTask

GB = 1e9  # bytes


@dataclasses.dataclass(frozen=True)
class Needs:
    """Memory of a program on one device, in bytes.

    Attributes:
      arguments: parameters, optimizer state and batch.
      temporaries: intermediate results at the peak.
      images: images of one device.
      budget: what the device has.
    """

    arguments: float
    temporaries: float
    images: int
    budget: float


def advise(
    task: SegmentationTask | UNetTask, architecture: Architecture, mesh: Mesh, needs: Needs
) -> list[str]:
    """One line for each setting that would help, with the memory that it would need.

    task: from `programs.abstract_task`; the one that does not fit.
    """
    lines, config = [_batch(needs)], task.config
    if config.compile.program == "train":
        state = abstract_state(task.abstract, config.optim)
        lines += _fsdp(state, mesh, config.mesh.tensor, needs)

    if config.compile.program == "train" and config.compile.advice:

        def kept(mode: str) -> float:
            """Bytes that the forward pass keeps for the backward pass with this mode, on one device."""
            other = with_settings(config, {"compute.remat": mode})
            changed = programs.abstract_task(other, architecture)
            return programs.kept_bytes(changed, architecture) * needs.images

        lines += _remat(config.compute.remat, kept, needs)
    return [line for line in lines if line]


def _batch(needs: Needs) -> str:
    """The largest batch that fits; empty if the batch is not the problem.

    Temporaries grow with the batch, arguments hardly do.
    """
    each = needs.temporaries / needs.images
    fit = math.floor((needs.budget - needs.arguments) / each) if each else 0
    if fit >= needs.images:
        return ""

    # Smaller batches do not help: the parameters alone are too large.
    if fit < 1:
        return (
            f"batch: not even one image a device fits beside {needs.arguments / GB:.2f} GB of "
            f"arguments; one needs about {each / GB:.2f} GB"
        )
    return (
        f"batch: config.compile.per_device_batch={fit} (train.batch_size={fit} a device) comes to "
        f"about {(needs.arguments + fit * each) / GB:.2f} GB, at {each / GB:.2f} GB an image; larger "
        f"batches with config.compute.accumulation"
    )


def _fsdp(state: object, mesh: Mesh, tensor: int, needs: Needs) -> list[str]:
    """Memory if the state, of shapes, were split over all data-parallel devices; exact for it.

    tensor: devices that share a weight matrix.
    """
    if mesh.shape["data"] == 1:
        return []

    # The state is laid out on this mesh, and on one that splits it over all devices.
    wide = MeshConfig(data=1, fsdp=mesh.shape["data"] * mesh.shape["fsdp"], tensor=tensor)
    now, then = (state_bytes(state, m) for m in (mesh, make_mesh(wide, list(mesh.devices.flat))))
    total = needs.arguments + needs.temporaries - now + then
    return [
        f"fsdp: config.mesh.data=1 --config.mesh.fsdp={wide.fsdp} keeps {then / GB:.2f} instead of "
        f"{now / GB:.2f} GB of the state on each device, about {total / GB:.2f} GB in all"
        f"{_verdict(total, needs)}"
    ]


def state_bytes(state: object, mesh: Mesh) -> float:
    """Bytes of a tree of shapes on one device of the mesh."""
    import jax

    shardings = infer_shardings(state, mesh)
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True)
    return float(sum(np.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in pairs))


def _remat(remat: str, kept: Callable[[str], float], needs: Needs) -> list[str]:
    """Other modes of rematerialization, by what the traced program keeps for the backward pass.

    remat: the mode that was compiled. kept: the bytes that a mode keeps, on one device.
    """
    # Only what is kept changes by the mode; other temporaries are taken to stay.
    now = kept(remat)
    lines = []
    for mode in MODES:
        then = now if mode == remat else kept(mode)
        if then < now:
            total = needs.arguments + max(needs.temporaries - now, 0.0) + then
            lines.append(
                f"rematerialization: config.compute.remat={mode} keeps {then / GB:.2f} instead of "
                f"{now / GB:.2f} GB for the backward pass, about {total / GB:.2f} GB in all"
                f"{_verdict(total, needs)}"
            )
    return lines


def _verdict(total: float, needs: Needs) -> str:
    """Whether a total fits, or by how much it does not."""
    return ": fits" if total <= needs.budget else f": {(total - needs.budget) / GB:.2f} GB too many"
