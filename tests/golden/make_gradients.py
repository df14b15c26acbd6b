# SPDX-License-Identifier: Apache-2.0
"""Makes gradients.npz: digests of torch's gradients for every parameter of small seeded models.

Needs torch, diffusers and transformers: `python tests/golden/make_gradients.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
from gradient_cases import CONFIGS, build_torch, digest, torch_gradients
from oracle import GOLDEN, fill_torch


def main() -> None:
    """Writes the file beside this script; keys are `case/parameter`."""
    found = {}
    for name in CONFIGS:
        model = build_torch(name)
        fill_torch(model)
        digests = digest(torch_gradients(name, model))
        found |= {f"{name}/{key}": value for key, value in digests.items()}
    keys = sorted(found)
    values = np.stack([found[key] for key in keys])
    np.savez_compressed(GOLDEN / "gradients.npz", keys=np.array(keys), values=values)


if __name__ == "__main__":
    main()
