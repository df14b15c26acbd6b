# SPDX-License-Identifier: Apache-2.0
"""Options of the TPU compiler for every program, as far as the installed libtpu accepts them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from digseg_jax.log import log

# With few images per chip, the compiler by itself turns rows of an image into examples ("space to
# batch") to fill its matrix unit, and pays with padded, masked float32 copies of whole activations:
# a residual block at 64x64x320, 4 images per chip, touches 2.9 GB with it and 0.46 GB without (v5e).
#
# A gradient that is sharded would be summed in a loop that passes parts of it
# around while it computes them ("windowed einsum"), on slices of the activations:
# for Stable Diffusion's U-Net 128 GB touched per step instead of 52 GB (v5e:4x4,
# fsdp 16, 4 images per chip). Kernels are no larger than this threshold.
OPTIONS = {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
    "xla_tpu_run_space_to_batch": False,
    "xla_tpu_run_space_to_batch_on_new_platforms": False,
}

# Share of the peak at which the compiler stops its search for a convolution's tiling. Fast tilings
# unroll: a convolution of 64x64x320, with its gradients, compiles in 25 s of one core at 1.0 (the
# compiler's default), 9 s at 0.95 and 3 s at 0.1.
UNTUNED = {"xla_jf_convolution_performance_target": 0.1}

ANY_SLICE = "v5e:2x2"  # stands for any TPU if none is here: libtpu has one table of options


def compiler_options(platform: str) -> dict[str, Any] | None:
    """Options for `jax.jit`: those of `OPTIONS` that the compiler accepts; None on other platforms."""
    if platform != "tpu":
        return None
    refused = refusals()
    return {name: value for name, value in OPTIONS.items() if name not in refused}


def untuned(platform: str) -> dict[str, Any]:
    """More options for `Lowered.compile`: any tiling of a convolution will do.

    For code that is never run: a program's memory, traffic and FLOPs do not depend on the tiling.
    """
    if platform != "tpu":
        return {}
    return {name: value for name, value in UNTUNED.items() if name not in refusals()}


@functools.cache
def refusals() -> dict[str, str]:
    """Options that the installed compiler rejects, with its message; logged once per process.

    An unknown option is an error in the program that it is given for, and versions of libtpu drop some:
    each is tried on a program of one addition.
    """
    wanted = OPTIONS | UNTUNED
    if refusal(wanted) is None:
        return {}

    said = {name: refusal({name: value}) for name, value in wanted.items()}
    refused = {name: why for name, why in said.items() if why is not None}

    for name, why in refused.items():
        log.warning(
            "left out, as the TPU compiler does not take it: %s=%s (%s)", name, wanted[name], why
        )
    return refused


def refusal(options: dict[str, Any], device: jax.Device | None = None) -> str | None:
    """A compiler's message against options, in one line; None if it accepts them.

    Args:
      options: by name.
      device: whose compiler; by default a TPU, an abstract one if this process has none.
    """
    device = device or _a_tpu()
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
    program = jax.jit(lambda x: x + 1).trace(number).lower(lowering_platforms=(device.platform,))

    try:
        program.compile(options)
    except (jax.errors.JaxRuntimeError, ValueError, AttributeError) as error:
        return " ".join(str(error).split())[:200]
    return None


def _a_tpu() -> jax.Device:
    """A TPU of this process, or an abstract one to compile for."""
    here = [device for device in jax.local_devices() if device.platform == "tpu"]
    if here:
        return here[0]
    return topologies.get_topology_desc(platform="tpu", topology_name=ANY_SLICE).devices[0]
