# SPDX-License-Identifier: Apache-2.0
"""COCO-Stuff-171: training set of the open-vocabulary tables. Paper: mIoU 50.8 at 512x512.

    python -m digseg_jax.main --config=configs/coco_stuff.py --config.data.root=DIR --workdir=RUN

The model comes from the hub: Stable Diffusion 2.1, or another one of digseg_jax/recipes.py, as in
configs/coco_stuff.py:vitb16. Comments in both files say where each setting is from.
Not run yet.
"""

from digseg_jax.recipes import stable_diffusion


def get_config(version: str = "sd21"):
    config = stable_diffusion(version, "coco_stuff")
    config.train.steps = 80_000  # ours: CAT-Seg's schedule on the same images
    return config
