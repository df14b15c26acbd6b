# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of accelerators, from their vendors' data sheets."""

from __future__ import annotations

import dataclasses
import re

GB, GIB = 1e9, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them.

    Attributes:
        kind: JAX's `device_kind`, or its first words.
        flops: dense bfloat16 FLOP/s; float32's for GPUs before Ampere, which have no bfloat16 units.
        hbm_bytes: memory.
        hbm_bandwidth: bytes/s between memory and chip.
        ici_bandwidth: bytes/s out of the chip over all links to its neighbors (on a GPU NVLink, or PCI
          Express without it); 0: unknown.
        source: document that the numbers are from.
        capability: CUDA's compute capability of an NVIDIA GPU; "" for other devices.
    """

    kind: str
    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    source: str
    capability: str = ""


_CLOUD = "Google Cloud documentation, TPU {}: system architecture"
_SHEET = "NVIDIA {} data sheet"
_A100, _H100, _H200 = _SHEET.format("A100"), _SHEET.format("H100"), _SHEET.format("H200 SXM")
_V100, _GA102, _AD102 = (
    _SHEET.format("V100"),
    "NVIDIA Ampere GA102 GPU architecture, appendix A",
    "NVIDIA Ada GPU architecture, appendix A",
)
CHIPS = {
    "v4": Chip("TPU v4", 275e12, 32 * GIB, 1228e9, 300e9, _CLOUD.format("v4")),
    "v5e": Chip("TPU v5 lite", 197e12, 16 * GIB, 819e9, 200e9, _CLOUD.format("v5e")),
    "v5p": Chip("TPU v5", 459e12, 95 * GIB, 2765e9, 600e9, _CLOUD.format("v5p")),
    "v6e": Chip("TPU v6", 918e12, 32 * GIB, 1640e9, 448e9, _CLOUD.format("v6e")),
    # GB as in the data sheets; a program never gets what the driver and libraries take of them.
    "t4": Chip("Tesla T4", 8.1e12, 16 * GB, 320e9, 16e9, _SHEET.format("T4"), "7.5"),
    "v100": Chip("Tesla V100-SXM2-16GB", 15.7e12, 16 * GB, 900e9, 150e9, _V100, "7.0"),
    "v100-32gb": Chip("Tesla V100-SXM2-32GB", 15.7e12, 32 * GB, 900e9, 150e9, _V100, "7.0"),
    "rtx3090": Chip("NVIDIA GeForce RTX 3090", 71e12, 24 * GB, 936e9, 32e9, _GA102, "8.6"),
    "rtx4090": Chip("NVIDIA GeForce RTX 4090", 165.2e12, 24 * GB, 1008e9, 32e9, _AD102, "8.9"),
    "a10g": Chip("NVIDIA A10G", 70e12, 24 * GB, 600e9, 32e9, _SHEET.format("A10G"), "8.6"),
    "l4": Chip("NVIDIA L4", 121e12, 24 * GB, 300e9, 32e9, _SHEET.format("L4"), "8.9"),
    "a100-40gb": Chip("NVIDIA A100-SXM4-40GB", 312e12, 40 * GB, 1555e9, 300e9, _A100, "8.0"),
    "a100": Chip("NVIDIA A100", 312e12, 80 * GB, 2039e9, 300e9, _A100, "8.0"),
    "h100-pcie": Chip("NVIDIA H100 PCIe", 756e12, 80 * GB, 2000e9, 300e9, _H100, "9.0"),
    "h100": Chip("NVIDIA H100", 989e12, 80 * GB, 3350e9, 450e9, _H100, "9.0"),
    "h200": Chip("NVIDIA H200", 989e12, 141 * GB, 4800e9, 450e9, _H200, "9.0"),
}
# Names of the same chips in some versions of JAX, or on other boards.
_OTHER_KINDS = {
    "TPU v5e": "v5e",
    "TPU v5p": "v5p",
    "TPU v6e": "v6e",
    "NVIDIA A100-PCIE-40GB": "a100-40gb",
}


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a JAX device kind; None if it is unknown, such as a CPU.

    Of several kinds that the name begins with, the longest counts, and whole words only: an "NVIDIA
    L40S" is not an "NVIDIA L4". A laptop's chip of the name, or a part of one (MIG), is another one.
    """
    if re.search(r"\b(Laptop|MIG)\b", device_kind):
        return None
    kinds = {chip.kind: chip for chip in CHIPS.values()}
    kinds |= {kind: CHIPS[name] for kind, name in _OTHER_KINDS.items()}
    # "NVIDIA A100" is also the beginning of the 40 GB boards' names: the longest match decides.
    known = [kind for kind in kinds if re.match(rf"{re.escape(kind)}(?!\w)", device_kind)]
    return kinds[max(known, key=len)] if known else None
