# SPDX-License-Identifier: Apache-2.0
"""Start-up settings for CPU back ends; to be called before JAX is imported."""

from __future__ import annotations

import importlib.metadata
import os

# XLA hands groups of operations to YNNPACK by default; on our U-Net that costs a third of the step
# (two cores, jaxlib 0.10: 673 ms with, 469 ms without). An unknown flag aborts the process, so it is
# set only for the versions that it was tried on.
FLAG = "--xla_cpu_experimental_ynn_fusion_type="
TRIED = ("0.10.",)


def tune() -> None:
    """Adds our XLA flag, unless the user has set that flag or the jaxlib is another one."""
    flags = os.environ.get("XLA_FLAGS", "")
    version = importlib.metadata.version("jaxlib")
    if FLAG.rstrip("=") not in flags and version.startswith(TRIED):
        os.environ["XLA_FLAGS"] = f"{flags} {FLAG}".strip()
