# SPDX-License-Identifier: Apache-2.0
"""Our side of `bench sample`: loads torch's files, times jitted programs. Runs in its own process."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from typing import Any

import numpy as np

from digseg_jax.config.schema import Config
from digseg_jax.runtime import cpu
from tests.bench.models_torch import best
from tests.bench.sample import SEED, TOKENS, inputs


def configuration(spec: dict[str, Any]) -> Config:
    """A plain Stable Diffusion: CLIP's tokens into cross-attention, no adapters between them."""
    base = Config()
    model = dataclasses.replace(
        base.model,
        unet=f"{spec['folder']}/unet",
        vae=f"{spec['folder']}/vae",
        max_tokens=TOKENS,
        mask_padding=False,
        sentence_token=False,
        text_adapters=False,
    )
    data = dataclasses.replace(base.data, image_size=spec["pixels"])
    compute = dataclasses.replace(base.compute, **spec["options"])
    return dataclasses.replace(base, model=model, data=data, compute=compute)


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Returns the times of each row and of compiling it; leaves mean masks in `spec["folder"]`."""
    # XLA takes as many threads as it may run on; torch got the same number
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec["threads"]])
    os.environ["JAX_PLATFORMS"] = "cpu"
    cpu.tune()
    import jax

    from digseg_jax.aot.shapes import Architecture, abstract_parts
    from digseg_jax.config.sampling import EStep
    from digseg_jax.segmentation.ensemble import combine
    from digseg_jax.training.tasks.parts import load_vae
    from digseg_jax.training.tasks.segmentation import SegmentationTask
    from digseg_jax.weights import load_config, load_unet_params

    config = configuration(spec)
    arrays = inputs(spec["size"], spec["pixels"], spec["queries"])
    tokens = jax.device_put(arrays["tokens"])
    vae, vae_params = load_vae(config.model, config.compute)
    architecture = Architecture(load_config(config.model.unet), vae.config, tokens.shape[-1])
    sections = config.data, config.model, config.compute, config.loss
    parts = abstract_parts(*sections, architecture, spec["queries"])
    task = SegmentationTask(config, parts)
    params = load_unet_params(config.model.unet, task.unet_config)
    bank = {"tokens": tokens, "mask": np.ones(tokens.shape[:2], bool)}
    arguments = (params, {"vae": vae_params, "bank": bank}, arrays["image"], np.zeros(1, np.int32))
    result = {}
    for row in spec["rows"]:
        estep = EStep.parse(row)

        def mean_masks(*arguments: Any, estep: EStep = estep) -> jax.Array:
            return combine(task.evidence(*arguments, estep, seed=SEED))[0]

        started = time.perf_counter()
        program = jax.jit(mean_masks).lower(*arguments).compile()
        compile_seconds, masks = time.perf_counter() - started, []

        def one(program: Any = program, masks: list[np.ndarray] = masks) -> None:
            masks[:] = [np.asarray(program(*arguments))]

        result[row] = best(one, spec["repeats"]) | {"compile_seconds": compile_seconds}
        np.save(f"{spec['folder']}/ours_{row}.npy", masks[0])
    return result


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
