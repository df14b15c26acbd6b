# SPDX-License-Identifier: Apache-2.0
"""ADE20K-150: trained on its 20,210 images, evaluated on val. Paper: mIoU 58.6 at 512x512.

    python -m digseg_jax.main --config=configs/ade20k.py --config.data.root=DIR --workdir=RUN

The model comes from the hub: Stable Diffusion 2.1, or another one of digseg_jax/recipes.py, as in
configs/ade20k.py:sd15_epsilon. Comments in both files say where each setting is from.
Not run yet.
"""

from digseg_jax.recipes import stable_diffusion


def get_config(version: str = "sd21"):
    config = stable_diffusion(version, "ade20k")
    return config
