# SPDX-License-Identifier: Apache-2.0
"""Our side of `bench models`: loads torch's files, times jitted programs. Runs in its own process."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import numpy as np

from digseg_jax.runtime import cpu
from tests.bench.models import ADAMW, inputs
from tests.bench.models_torch import best


def main(spec: dict[str, Any]) -> dict[str, Any]:
    """Returns the times of each pass and of compiling; leaves the output in `spec["folder"]`."""
    # XLA takes as many threads as it may run on; torch got the same number
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec["threads"]])
    os.environ["JAX_PLATFORMS"] = "cpu"
    cpu.tune()
    import jax
    import jax.numpy as jnp
    import optax

    from digseg_jax.models import functional
    from digseg_jax.weights import load_component

    model = load_component(spec["folder"], **spec["options"])
    graphdef, params = functional.split(model)
    arguments = [
        jnp.asarray(np.moveaxis(x, 1, -1) if x.ndim == 4 else x)
        for x in inputs(spec["case"], spec["size"], spec["cells"])
    ]

    def forward(params: Any, *arguments: jax.Array) -> jax.Array:
        return _call(spec["case"], functional.merge(graphdef, params), arguments)

    def loss(params: Any, *arguments: jax.Array) -> jax.Array:
        return jnp.square(forward(params, *arguments)).mean()

    optimizer = optax.adamw(**ADAMW)

    def train_step(state: Any, *arguments: jax.Array) -> tuple[Any, jax.Array]:
        params, moments = state
        value, gradients = jax.value_and_grad(loss)(params, *arguments)
        updates, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    functions = {"forward": forward, "forward_backward": jax.value_and_grad(loss)}
    started = time.perf_counter()
    programs = {
        name: jax.jit(functions[name]).lower(params, *arguments).compile()
        for name in spec["passes"]
        if name in functions
    }
    result: dict[str, Any] = {"compile_seconds": time.perf_counter() - started}
    np.save(f"{spec['folder']}/ours.npy", programs["forward"](params, *arguments))
    for name, program in programs.items():
        result[name] = best(
            lambda program=program: _number(jax.block_until_ready(program(params, *arguments))),
            spec["repeats"],
        )
    if "train_step" in spec["passes"]:  # last: it takes the parameters over
        state = (params, jax.jit(optimizer.init)(params))
        started = time.perf_counter()
        step = jax.jit(train_step, donate_argnums=0).lower(state, *arguments).compile()
        result["compile_seconds"] += time.perf_counter() - started
        del params

        def one() -> float:
            nonlocal state
            state, value = step(state, *arguments)
            return float(jax.block_until_ready(value))

        result["train_step"] = best(one, spec["repeats"])
    return result


def _number(out: Any) -> float | None:
    """The loss, where a pass returns it with its gradients."""
    return float(out[0]) if isinstance(out, tuple) else None


def _call(case: str, model: Any, arguments: tuple[Any, ...]) -> Any:
    if case == "unet":
        return model(*arguments)
    if case == "vae_encode":
        return model.encode(*arguments).mean
    return model.decode(*arguments)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
