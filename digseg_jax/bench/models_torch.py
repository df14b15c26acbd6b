# SPDX-License-Identifier: Apache-2.0
"""Torch's side of `bench models`: writes the weights, times eager calls. Runs in its own process."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from digseg_jax.bench.models import CASES, inputs


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Returns the times of each pass; leaves the model and its output in `spec["folder"]`."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec["threads"]])
    import diffusers
    import torch

    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    name, configs = CASES[spec["case"]]
    model = getattr(diffusers, name).from_config(configs[spec["size"]])
    model.save_pretrained(spec["folder"])
    arguments = [torch.from_numpy(x) for x in inputs(spec["case"], spec["size"])]

    def forward() -> Any:
        with torch.no_grad():
            return _call(spec["case"], model, arguments)

    def forward_backward() -> None:
        model.zero_grad(set_to_none=True)
        _call(spec["case"], model, arguments).square().mean().backward()

    np.save(f"{spec['folder']}/torch.npy", np.moveaxis(forward().numpy(), 1, -1))
    functions = {"forward": forward, "forward_backward": forward_backward}
    return {name: best(functions[name], spec["repeats"]) for name in spec["passes"]}


def best(function: Callable[[], Any], repeats: int) -> dict[str, float]:
    """The fastest of `repeats` calls: seconds on the clock, and of processor time over all threads."""
    seconds, cpu_seconds = [], []
    for _ in range(repeats):
        started, used = time.perf_counter(), time.process_time()
        function()
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - used)
    return {"seconds": min(seconds), "cpu_seconds": min(cpu_seconds)}


def _call(case: str, model: Any, arguments: list[Any]) -> Any:
    if case == "unet":
        return model(*arguments).sample
    if case == "vae_encode":
        return model.encode(*arguments).latent_dist.mean
    return model.decode(*arguments).sample


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
