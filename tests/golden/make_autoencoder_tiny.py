# SPDX-License-Identifier: Apache-2.0
"""Makes autoencoder_tiny_small.npz: torch diffusers' outputs of a small TAESD with seeded weights.

Needs torch and diffusers: `python tests/golden/make_autoencoder_tiny.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
from oracle import GOLDEN, TINY_VAE, fill_torch, nhwc, seeded_input


def main() -> None:
    """Writes the file beside this script."""
    model = AutoencoderTiny.from_config(TINY_VAE)
    fill_torch(model)
    with torch.no_grad():
        latent = model.encode(torch.from_numpy(seeded_input("image", (2, 3, 16, 24)))).latents
        image = model.decode(torch.from_numpy(seeded_input("latent", (2, 4, 4, 6)))).sample
    np.savez_compressed(
        GOLDEN / "autoencoder_tiny_small.npz",
        latent=nhwc(latent.numpy()),
        image=nhwc(image.numpy()),
    )


if __name__ == "__main__":
    main()
