# SPDX-License-Identifier: Apache-2.0
"""Cityscapes, 19 classes, 2048x1024. Paper: mIoU 38.5 open-vocabulary, trained on COCO-Stuff;
supervised only images.

    python -m digseg_jax.main --config=configs/cityscapes.py --config.data.root=DIR --workdir=RUN

The model comes from the hub: Stable Diffusion 2.1, or another one of digseg_jax/recipes.py, as in
configs/cityscapes.py:sd15_epsilon. Comments in both files say where each setting is from.
Not run yet.
"""

from digseg_jax.recipes import stable_diffusion


def get_config(version: str = "sd21"):
    config = stable_diffusion(version, "cityscapes")
    config.data.num_queries = 6  # ours: most classes are in every image
    return config
