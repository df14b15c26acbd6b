# SPDX-License-Identifier: Apache-2.0
"""One training step of the full-size Stable Diffusion 1.5 model with random weights: does it fit?"""

from __future__ import annotations

import dataclasses
import resource
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from digseg_jax import trees
from digseg_jax.aot.shapes import Architecture, abstract_parts
from digseg_jax.arraytypes import Params
from digseg_jax.config.schema import Config
from digseg_jax.errors import UserError
from digseg_jax.log import log
from digseg_jax.models import functional
from digseg_jax.models.unet import UNetConfig
from digseg_jax.models.vae import VaeConfig
from digseg_jax.runtime.sharding import infer_shardings, make_mesh, place, place_batch
from digseg_jax.training.optim import make_optimizer
from digseg_jax.training.step import abstract_state, initial_state, make_train_step
from digseg_jax.training.tasks.parts import Parts
from digseg_jax.training.tasks.segmentation import SegmentationTask

TOKENS, WIDTH, PROMPTS = 77, 768, 4  # CLIP ViT-L/14's
GB = 1e9


def random_parts(config: Config, unet: UNetConfig, vae: VaeConfig) -> Parts:
    """Parts of Stable Diffusion 1.5's shapes with random weights: no files needed."""
    sections = config.data, config.model, config.compute, config.loss
    parts = abstract_parts(*sections, Architecture(unet, vae, WIDTH), PROMPTS)
    bank = parts.frozen["bank"]
    tokens = np.random.default_rng(config.seed).normal(size=bank["tokens"].shape)
    frozen = {
        "vae": functional.random_init(parts.frozen["vae"], config.seed),
        "bank": {"tokens": tokens.astype(np.float32), "mask": np.ones(bank["mask"].shape, bool)},
    }
    return dataclasses.replace(parts, frozen=frozen)


class RandomTask(SegmentationTask):
    """The segmentation task from random weights."""

    def initial(self) -> Params:
        """Nothing starts at zero, so that one step moves every parameter."""
        return functional.random_init(self.abstract, self.config.seed)


def configuration(size: int, dtype: str, ema: bool) -> Config:
    """One image, one query; a constant learning rate, since warm-up starts at zero."""
    base = Config()
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, image_size=size, num_queries=1),
        model=dataclasses.replace(base.model, dtype=dtype, max_tokens=TOKENS, sentence_token=False),
        optim=dataclasses.replace(
            base.optim,
            learning_rate=3e-5,
            warmup_steps=0,
            schedule="constant",
            ema_decay=base.optim.ema_decay if ema else 0.0,
        ),
        train=dataclasses.replace(base.train, batch_size=1),
    )


def made_up_batch(size: int) -> dict[str, np.ndarray]:
    """One image whose left half is the queried class."""
    label = np.zeros((1, size, size), np.int32)
    label[:, :, size // 2 :] = 1
    image = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), np.uint8)
    zero = np.zeros((1, 1), np.int32)
    return {"image": image, "label": label, "query": zero, "query_class": zero,
            "index": np.zeros(1, np.uint32)}  # fmt: skip


def run(
    size: int,
    dtype: str,
    *,
    ema: bool,
    unet: UNetConfig | None = None,
    vae: VaeConfig | None = None,
) -> dict[str, Any]:
    """Compiles the step, says what it needs, and runs it once, on one device.

    Raises:
      UserError: the step needs more memory than the machine has left.
    """
    config = configuration(size, dtype, ema)
    task = RandomTask(config, random_parts(config, unet or UNetConfig(), vae or VaeConfig()))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    optimizer = make_optimizer(config.optim, config.train.steps)

    def initial(params: Params) -> dict[str, Any]:
        return initial_state(params, optimizer, config.optim)

    abstract = abstract_state(task.abstract, config.optim)
    shardings, frozen_shardings = infer_shardings((abstract, task.frozen), mesh)
    options = {"steps": config.train.steps, "seed": config.seed}
    step = make_train_step(task, mesh, shardings, frozen_shardings, config.optim, **options)
    batch = place_batch(made_up_batch(size), mesh)
    start = time.monotonic()
    lowered = step.lower(abstract, task.frozen, batch)
    compiled = lowered.compile()
    compile_seconds = time.monotonic() - start
    needed = needed_bytes(compiled)
    log.info("compiled in %.0f s; the step needs %.1f GB", compile_seconds, needed / GB)
    check_room(needed)
    params = place(task.initial(), shardings["params"])
    state = jax.jit(initial, out_shardings=shardings, donate_argnums=0)(params)
    del params
    frozen = place(task.frozen, frozen_shardings)
    start = time.monotonic()
    state, metrics = jax.block_until_ready(compiled(state, frozen, batch))
    seconds = time.monotonic() - start
    still = unmoved(task, state["params"])
    return {
        "model": "Stable Diffusion 1.5, random weights" if unet is None else "another",
        "parameters": sum(int(np.prod(x.shape)) for x in jax.tree.leaves(task.abstract)),
        "image_size": size,
        "dtype": dtype,
        "ema": ema,
        "loss": float(metrics["loss"]),
        "grad_norm": float(metrics["grad_norm"]),
        "parameter_arrays": len(jax.tree.leaves(task.abstract)),
        "unmoved": still,
        "compile_seconds": round(compile_seconds, 1),
        "step_seconds": round(seconds, 1),
        "tflops": round((lowered.cost_analysis() or {}).get("flops", 0.0) / 1e12, 3),
        "needed_gb": round(needed / GB, 2),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GB, 2),
    }


def needed_bytes(compiled: jax.stages.Compiled) -> int:
    """Arguments, results that are not written over them, and temporaries."""
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes


def check_room(needed: int) -> None:
    """Raises UserError if the host has less memory than that available (on Linux, with a CPU)."""
    path = Path("/proc/meminfo")
    if jax.default_backend() != "cpu" or not path.exists():
        return
    lines = dict(line.split(":") for line in path.read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    if needed > available:
        raise UserError(
            f"the step needs {needed / GB:.1f} GB, {(needed - available) / GB:.1f} GB more than is "
            "available: free some memory, or try --no-ema, --dtype bfloat16 or a smaller --size"
        )


def unmoved(task: RandomTask, params: Params) -> list[str]:
    """Paths of parameters that are what they were; drawn again one by one, to save a copy."""
    still = []
    for path, value in trees.flatten(params).items():
        leaf = jax.ShapeDtypeStruct(value.shape, jnp.float32)
        drawn = functional.random_init({path: leaf}, task.config.seed)
        if np.array_equal(np.asarray(value), trees.flatten(drawn)[path]):
            still.append(path)
    return still
