# SPDX-License-Identifier: Apache-2.0
"""Programs for NVIDIA GPUs without a GPU: lowered for CUDA, accounted by another compiler.

CUDA's compiler needs a GPU. So the program that would run is lowered for CUDA, which proves that JAX
accepts it, and one that computes the same is compiled for as many simulated CPU devices: for arguments,
FLOPs and collectives. Temporaries come from the program as it is written (`aot.liveness`), since a
CPU's are three times a TPU's. All of it is an estimate, and is labeled as one.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

from jax._src.cudnn import fused_attention_stablehlo as fused_attention
from jax.sharding import Mesh

from digseg_jax.aot import programs
from digseg_jax.aot.programs import Program
from digseg_jax.aot.shapes import Architecture, UNetTask
from digseg_jax.config.parse import with_settings
from digseg_jax.models.kernels.attention import unfit
from digseg_jax.training.tasks.parts import PORTABLE
from digseg_jax.training.tasks.segmentation import SegmentationTask

CUDNN = 91000  # version assumed where none is installed: 9.10
# The CPU's code is never run: compile fast instead of well.
OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
HOW = (
    "lowered for CUDA, not compiled for it. Arguments, FLOPs, traffic and collectives are of the same "
    "program compiled for simulated CPU devices, which compute bfloat16 in float32: traffic and "
    "collectives are too large, and the roofline leaves the memory out. Temporaries are those of the "
    "program as it is written"
)


def stand_in(
    task: SegmentationTask | UNetTask, architecture: Architecture, mesh: Mesh
) -> list[Program]:
    """Programs for CPU devices that compute what the task asks of a GPU.

    Raises:
      Exception: JAX's own, if the program cannot be lowered for CUDA.
    """
    with assumed_cudnn():
        programs.lower(task, architecture, mesh, "cuda")

    # cuDNN's attention does not compile for a CPU: take the portable one, which computes the same.
    config, device = task.config, mesh.devices.flat[0]
    if unfit(config.compute.attention, device, config.model.dtype):
        portable = with_settings(config, {"compute.attention": PORTABLE})
        task = programs.abstract_task(portable, architecture)
    return programs.lower(task, architecture, mesh)


def estimates(
    measured: list[dict[str, Any]], temporaries: list[float], budget: float
) -> list[dict[str, Any]]:
    """Memory of `stand_in`'s compiled programs, with the temporaries of a GPU in place of a CPU's.

    Args:
      measured: per program, as `compile_and_measure` returns it.
      temporaries: per program, bytes on one device as `programs.temporary_bytes` returns them.
      budget: bytes of one GPU.
    """
    found = []
    for values, stored in zip(measured, temporaries, strict=True):
        # The CPU's own temporaries stay in the result, for comparison.
        peak = values["hbm_args_bytes"] + stored + values["hbm_result_bytes"]
        peak += values["hbm_waiting_bytes"]
        own = {"fits": peak <= budget, "hbm_temp_bytes": stored, "hbm_peak_bytes": peak}
        own |= {"cpu_temp_bytes": values["hbm_temp_bytes"], "estimate": True, "estimated_by": HOW}
        found.append(values | own)
    return found


@contextlib.contextmanager
def assumed_cudnn() -> Iterator[None]:
    """Context in which JAX finds a version of cuDNN, all that tracing cuDNN's attention asks for.

    An installed cuDNN answers for itself.
    """
    before: Any = fused_attention.cuda_versions
    if before is None:
        assumed: Any = types.SimpleNamespace(cudnn_get_version=lambda: CUDNN)
        fused_attention.cuda_versions = assumed
    try:
        yield
    finally:
        fused_attention.cuda_versions = before
