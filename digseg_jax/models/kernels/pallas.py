# SPDX-License-Identifier: Apache-2.0
"""Shared parts of the Pallas kernels for TPUs: the call, and a matrix product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from digseg_jax.arraytypes import Array


def call(
    kernel: Callable[..., None],
    name: str,
    in_specs: list[Any],
    out_specs: Any,
    shapes: Any,
    *,
    grid: tuple[int, ...],
    parallel: int = 0,
    memory: int | None = None,
    interpret: bool = False,
) -> Callable[..., Any]:
    """Builds a function of the inputs that runs `kernel` on each of their blocks.

    Args:
      kernel: takes references to one block of each input, then of each result, and fills the results.
      name: name of the call in the compiled program; `aot.kernels` looks up its FLOPs by it.
      in_specs, out_specs: how inputs and results are cut into blocks.
      shapes: shapes and dtypes of the results.
      grid: number of blocks along each axis.
      parallel: number of leading grid axes whose blocks may run in any order. Along the others they
        run one after another, and may sum into the same result.
      memory: most bytes of the chip's own memory; the compiler's default if None.
      interpret: run the kernel's semantics on any platform, slowly; for tests.
    """
    from jax.experimental import pallas as pl  # here: useless elsewhere, and costs start-up time
    from jax.experimental.pallas import tpu as pltpu

    order: list[Literal["parallel", "arbitrary"]] = ["parallel"] * parallel
    order += ["arbitrary"] * (len(grid) - parallel)  # Pallas' word for "in order"

    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=tuple(order), vmem_limit_bytes=memory),
        interpret=interpret,
    )


def product(a: Array, b: Array, i: int, j: int) -> Array:
    """Matrix product of a and b, summed over axis i of a and j of b in float32."""
    return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32)
