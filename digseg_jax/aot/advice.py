# SPDX-License-Identifier: Apache-2.0
"""What would fit: computed from the program's own numbers, where a compilation went over the budget."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jax.sharding import Mesh

from digseg_jax.aot import programs
from digseg_jax.aot.shapes import Parts
from digseg_jax.config.schema import Config, MeshConfig
from digseg_jax.models.remat import MODES
from digseg_jax.runtime.sharding import infer_shardings, make_mesh
from digseg_jax.training.step import abstract_state

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Needs:
    """Bytes on one device: of the arguments, of temporaries; images there; and what there is."""

    arguments: float
    temporaries: float
    images: int
    budget: float


def advise(config: Config, parts: Parts, mesh: Mesh, needs: Needs) -> list[str]:
    """One line for each setting that would help, with the bytes that it would come to."""
    lines = [_batch(needs)]
    if config.compile.program == "train":
        lines += [*_fsdp(config, parts, mesh, needs), *_remat(config, parts, needs)]
    return [line for line in lines if line]


def _batch(needs: Needs) -> str:
    """Temporaries grow with the batch, arguments hardly do."""
    each = needs.temporaries / needs.images
    fit = math.floor((needs.budget - needs.arguments) / each) if each else 0
    if fit >= needs.images:
        return ""
    if fit < 1:
        return (
            f"batch: not even one image a device fits beside {needs.arguments / GB:.2f} GB of "
            f"arguments; one needs about {each / GB:.2f} GB"
        )
    return (
        f"batch: config.compile.per_device_batch={fit} (train.batch_size={fit} a device) comes to "
        f"about {(needs.arguments + fit * each) / GB:.2f} GB, at {each / GB:.2f} GB an image; larger "
        f"batches with config.train.accumulation"
    )


def _fsdp(config: Config, parts: Parts, mesh: Mesh, needs: Needs) -> list[str]:
    """The state on every device, exactly, if all devices shared it."""
    if mesh.shape["data"] == 1:
        return []
    task, _ = programs.train_task(config, parts, 1)
    state = abstract_state(task.abstract, config)
    wide = MeshConfig(data=1, fsdp=mesh.shape["data"] * mesh.shape["fsdp"], tensor=config.mesh.tensor)
    now, then = (state_bytes(state, m) for m in (mesh, make_mesh(wide, list(mesh.devices.flat))))
    total = needs.arguments + needs.temporaries - now + then
    return [
        f"fsdp: config.mesh.data=1 --config.mesh.fsdp={wide.fsdp} keeps {then / GB:.2f} instead of "
        f"{now / GB:.2f} GB of the state on each device, about {total / GB:.2f} GB in all"
        f"{_verdict(total, needs)}"
    ]


def state_bytes(state: object, mesh: Mesh) -> float:
    """Of a tree of shapes, on one device of the mesh."""
    import jax

    shardings = infer_shardings(state, mesh)
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True)
    return float(sum(np.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in pairs))


def _remat(config: Config, parts: Parts, needs: Needs) -> list[str]:
    """Other rematerialisation: the program traced with each, what the backward pass would keep."""
    if not config.compile.advice:
        return []

    def kept(mode: str) -> float:
        model = dataclasses.replace(config.model, remat=mode)
        return programs.kept_bytes(dataclasses.replace(config, model=model), parts) * needs.images

    now = kept(config.model.remat)
    lines = []
    for mode in MODES:
        then = now if mode == config.model.remat else kept(mode)
        if then < now:
            total = needs.arguments + max(needs.temporaries - now, 0.0) + then
            lines.append(
                f"rematerialisation: config.model.remat={mode} keeps {then / GB:.2f} instead of "
                f"{now / GB:.2f} GB for the backward pass, about {total / GB:.2f} GB in all"
                f"{_verdict(total, needs)}"
            )
    return lines


def _verdict(total: float, needs: Needs) -> str:
    return ": fits" if total <= needs.budget else f": {(total - needs.budget) / GB:.2f} GB too many"
