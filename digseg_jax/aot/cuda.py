# SPDX-License-Identifier: Apache-2.0
"""Programs lowered for NVIDIA GPUs where none is installed."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator

from jax._src.cudnn import fused_attention_stablehlo as fused_attention

CUDNN = 91000  # the version that is assumed, 9.10


@contextlib.contextmanager
def assumed_cudnn() -> Iterator[None]:
    """Answers the one question that JAX asks of an installation when it traces cuDNN's attention: which
    version of cuDNN is there. An installed one answers for itself."""
    before = fused_attention.cuda_versions
    if before is None:
        fused_attention.cuda_versions = types.SimpleNamespace(cudnn_get_version=lambda: CUDNN)
    try:
        yield
    finally:
        fused_attention.cuda_versions = before
