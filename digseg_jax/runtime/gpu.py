# SPDX-License-Identifier: Apache-2.0
"""Start-up settings for NVIDIA GPUs; call `tune` before JAX is imported."""

from __future__ import annotations

import os

# JAX reserves its share of a GPU's memory at the start, and no program gets more: by
# default three quarters. Only the driver and CUDA's libraries need memory beside it. A
# user may have set either name (the second is the older one); JAX rejects both together.
KEYS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
SHARE = "0.9"


def tune() -> None:
    """Gives JAX `SHARE` of each GPU's memory, unless the user has said how much."""
    if not any(os.environ.get(key) for key in KEYS):
        os.environ[KEYS[0]] = SHARE


def memory_share() -> float:
    """Share of a GPU's memory that a run gets, from 0 to 1."""
    return float(next((os.environ[key] for key in KEYS if os.environ.get(key)), SHARE))
