# SPDX-License-Identifier: Apache-2.0
"""Settings of the TPU compiler for every program of ours."""

from __future__ import annotations

import importlib.metadata
from typing import Any

# With few images a chip, the compiler by itself turns rows of a picture into examples ("space to
# batch") to fill its matrix unit, and pays with padded, masked float32 copies of whole activations:
# a residual block at 64x64x320, 4 images a chip, touches 2.9 GB with it and 0.46 GB without (v5e).
# An unknown option is an error, so it is set only for the versions that it was tried with.
#
# A gradient that is wanted in parts would be summed in a loop that passes the parts around while it
# computes them ("windowed einsum"), on slices of the activations: for Stable Diffusion's U-Net 128 GB
# touched a step in place of 52 GB (v5e:4x4, fsdp 16, 4 images a chip). Kernels are no larger than this.
OPTIONS = {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
    "xla_tpu_run_space_to_batch": False,
    "xla_tpu_run_space_to_batch_on_new_platforms": False,
}
TRIED = ("0.0.42",)

# The share of the peak at which the compiler stops its search for a convolution's tiling. Fast tilings
# unroll: a convolution of 64x64x320, with its gradients, is compiled in 25 s of a core at 1.0 (the
# compiler's default), 9 s at 0.95 and 3 s at 0.1.
UNTUNED = {"xla_jf_convolution_performance_target": 0.1}


def compiler_options(platform: str) -> dict[str, Any] | None:
    """For `jax.jit`; None on other platforms and with other versions of libtpu."""
    if platform != "tpu":
        return None
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return None
    return dict(OPTIONS) if version.startswith(TRIED) else None


def untuned(platform: str) -> dict[str, Any]:
    """More options for `Lowered.compile`: any tiling of a convolution will do.

    Their code is never run: only a program's memory, traffic and FLOPs are wanted, which do not depend
    on it.
    """
    return dict(UNTUNED) if compiler_options(platform) else {}
