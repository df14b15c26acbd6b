# SPDX-License-Identifier: Apache-2.0
"""Makes vae_small.npz: what torch diffusers computes for the small VAE with seeded weights.

Needs torch and diffusers: `python tests/golden/make_vae.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
from oracle import GOLDEN, VAE, fill_torch, nhwc, seeded_input


def main() -> None:
    """Writes the file beside this script."""
    model = AutoencoderKL.from_config(VAE)
    fill_torch(model)
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(seeded_input("image", (2, 3, 16, 24)))).latent_dist
        image = model.decode(torch.from_numpy(seeded_input("latent", (2, 4, 4, 6)))).sample
    np.savez_compressed(
        GOLDEN / "vae_small.npz",
        mean=nhwc(posterior.mean.numpy()),
        logvar=nhwc(posterior.logvar.numpy()),
        image=nhwc(image.numpy()),
    )


if __name__ == "__main__":
    main()
