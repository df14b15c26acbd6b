# SPDX-License-Identifier: Apache-2.0
"""What accelerators can do, from their vendors' data sheets."""

from __future__ import annotations

import dataclasses

GB, GIB = 1e9, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them.

    Attributes:
        kind: the start of JAX's `device_kind`.
        flops: dense bfloat16 FLOP/s.
        hbm_bytes: memory.
        hbm_bandwidth: bytes/s between memory and chip.
        ici_bandwidth: bytes/s out of the chip over all of its links to its neighbours; 0: unknown.
        source: where the numbers stand.
    """

    kind: str
    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    source: str


_CLOUD = "Google Cloud documentation, TPU {}: system architecture"
CHIPS = {
    "v4": Chip("TPU v4", 275e12, 32 * GIB, 1228e9, 300e9, _CLOUD.format("v4")),
    "v5e": Chip("TPU v5 lite", 197e12, 16 * GIB, 819e9, 200e9, _CLOUD.format("v5e")),
    "v5p": Chip("TPU v5", 459e12, 95 * GIB, 2765e9, 600e9, _CLOUD.format("v5p")),
    "v6e": Chip("TPU v6", 918e12, 32 * GIB, 1640e9, 448e9, _CLOUD.format("v6e")),
    "a100": Chip("NVIDIA A100", 312e12, 80 * GB, 2039e9, 300e9, "NVIDIA A100 80GB data sheet"),
    "h100": Chip("NVIDIA H100", 989e12, 80 * GB, 3350e9, 450e9, "NVIDIA H100 SXM data sheet"),
    "h200": Chip("NVIDIA H200", 989e12, 141 * GB, 4800e9, 450e9, "NVIDIA H200 SXM data sheet"),
}
_OTHER_KINDS = {"TPU v5e": "v5e"}  # what some versions of JAX say


def chip_of(device_kind: str) -> Chip | None:
    """The chip with the longest matching kind; None where nothing is known, such as for a CPU."""
    kinds = {chip.kind: chip for chip in CHIPS.values()}
    kinds |= {kind: CHIPS[name] for kind, name in _OTHER_KINDS.items()}
    known = [kind for kind in kinds if device_kind.startswith(kind)]
    return kinds[max(known, key=len)] if known else None
