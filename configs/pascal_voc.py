# SPDX-License-Identifier: Apache-2.0
"""PASCAL VOC-20, supervised (ours); not in the paper's tables.

    python -m digseg_jax.main --config=configs/pascal_voc.py --config.data.root=DIR --workdir=RUN

The model comes from the hub: Stable Diffusion 2.1, or another one of digseg_jax/recipes.py, as in
configs/pascal_voc.py:sd15_epsilon. Comments in both files say where each setting is from.
Not run yet.
"""

from digseg_jax.recipes import stable_diffusion


def get_config(version: str = "sd21"):
    config = stable_diffusion(version, "pascal_voc")
    config.train.steps = 10_000  # ours: 1,464 images
    return config
