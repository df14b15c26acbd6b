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

from tests.bench.models import ADAMW, CASES, inputs


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
    arguments = [torch.from_numpy(x) for x in inputs(spec["case"], spec["size"], spec["cells"])]

    def forward() -> Any:
        with torch.no_grad():
            return _call(spec["case"], model, arguments)

    def forward_backward() -> float:
        model.zero_grad(set_to_none=True)
        loss = _call(spec["case"], model, arguments).square().mean()
        loss.backward()
        return loss.item()

    def train_step() -> float:
        loss = forward_backward()
        optimizer.step()
        return loss

    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=ADAMW["learning_rate"],
        betas=(ADAMW["b1"], ADAMW["b2"]),
        eps=ADAMW["eps"],
        weight_decay=ADAMW["weight_decay"],
    )
    np.save(f"{spec['folder']}/torch.npy", np.moveaxis(forward().numpy(), 1, -1))
    functions = {
        "forward": forward,
        "forward_backward": forward_backward,
        "train_step": train_step,
    }
    return {name: best(functions[name], spec["repeats"]) for name in spec["passes"]}


def best(function: Callable[[], Any], repeats: int) -> dict[str, float]:
    """The fastest of `repeats` calls: seconds on the clock, and of processor time over all threads.

    Where the function returns a number, the last one is the "loss".
    """
    seconds, cpu_seconds, out = [], [], None
    for _ in range(repeats):
        started, used = time.perf_counter(), time.process_time()
        out = function()
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - used)
    times = {"seconds": min(seconds), "cpu_seconds": min(cpu_seconds)}
    return times | {"loss": out} if isinstance(out, float) else times


def _call(case: str, model: Any, arguments: list[Any]) -> Any:
    if case == "unet":
        return model(*arguments).sample
    if case == "vae_encode":
        return model.encode(*arguments).latent_dist.mean
    return model.decode(*arguments).sample


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
