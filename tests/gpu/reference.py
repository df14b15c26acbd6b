# SPDX-License-Identifier: Apache-2.0
"""The first training step on a CPU in float32: what a GPU's has to agree with.

Started by `python -m tests.gpu` as a process of its own, while the GPU works.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from digseg_jax.config.parse import parse
from digseg_jax.config.schema import Config, MeshConfig
from digseg_jax.data.pipeline import training_stream
from digseg_jax.runtime import cpu
from digseg_jax.runtime.sharding import make_mesh, on_mesh
from digseg_jax.training.step import accumulate
from digseg_jax.training.tasks.base import example_keys
from digseg_jax.training.tasks.parts import choose_kernels
from digseg_jax.training.tasks.segmentation import SegmentationTask


def first_step(config: Config) -> dict[str, float]:
    """Loss and gradient norm of the first batch, taken an image at a time to bound the memory."""
    model = dataclasses.replace(config.model, dtype="float32")
    compute = dataclasses.replace(config.compute, attention="auto")
    kernels = choose_kernels(compute, jax.devices("cpu"), model.dtype, config.mesh.tensor)
    config = dataclasses.replace(config, model=model, compute=kernels)
    task, mesh = SegmentationTask(config), make_mesh(MeshConfig(1, 1, 1), jax.devices("cpu")[:1])
    params = task.initial()
    stream = training_stream(
        config.data, config.task, seed=config.seed, batch_size=config.train.batch_size,
        start=0, host=0, hosts=1, loading=config.loading,
    )  # fmt: skip
    with stream as batches:
        batch = next(batches)

    def step(params: Any, frozen: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        def gradient(part: Any, whole: Any) -> Any:
            keys = example_keys(config.seed, part["index"])
            return jax.value_and_grad(task.loss, has_aux=True)(params, frozen, part, keys, whole)

        zeros = jax.tree.map(jnp.zeros_like, params)
        (loss, _), grads = accumulate(gradient, zeros, batch, config.train.batch_size, mesh)
        return loss, optax.global_norm(grads)

    loss, norm = jax.jit(on_mesh(mesh, step))(params, task.frozen, batch)
    return {"loss": float(loss), "grad_norm": float(norm)}


def main() -> None:
    """CONFIG.json RESULT.json."""
    cpu.tune()
    started = time.monotonic()
    config = parse(json.loads(Path(sys.argv[1]).read_text()))
    values = first_step(config) | {"seconds": time.monotonic() - started}
    Path(sys.argv[2]).write_text(json.dumps(values))


if __name__ == "__main__":
    main()
