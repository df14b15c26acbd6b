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


def compiler_options(platform: str) -> dict[str, Any] | None:
    """For `jax.jit`; None on other platforms and with other versions of libtpu."""
    if platform != "tpu":
        return None
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return None
    return dict(OPTIONS) if version.startswith(TRIED) else None
