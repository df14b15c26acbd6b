# SPDX-License-Identifier: Apache-2.0
"""Makes unet_small.npz: what torch diffusers computes for small U-Nets with seeded weights.

Needs torch and diffusers: `python tests/golden/make_unet.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from diffusers import UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
from oracle import GOLDEN, UNETS, fill_torch, nhwc, torch_unet_output, unet_inputs


def main() -> None:
    """Writes the file beside this script."""
    outputs = {}
    for name, config in UNETS.items():
        model = UNet2DConditionModel.from_config(config)
        fill_torch(model)
        outputs[name] = nhwc(torch_unet_output(model, *unet_inputs()))
    np.savez_compressed(GOLDEN / "unet_small.npz", **outputs)


if __name__ == "__main__":
    main()
