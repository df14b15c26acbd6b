# SPDX-License-Identifier: Apache-2.0
"""MoNuSeg nuclei, 1000x1000, the challenge's 30 training images. Paper: Dice 78.27, IoU 64.29.

    python -m digseg_jax.main --config=configs/monuseg.py --config.data.root=DIR --workdir=RUN

The model comes from the hub: Stable Diffusion 2.1, or another one of digseg_jax/recipes.py, as in
configs/monuseg.py:biomedclip. Comments in both files say where each setting is from.
Not run yet.
"""

from digseg_jax.recipes import stable_diffusion


def get_config(version: str = "sd21"):
    config = stable_diffusion(version, "monuseg")
    config.data.num_queries = 1  # ours: two classes
    config.train.steps = 5_000  # ours: 30 images
    config.eval.split = "test"  # paper: the 14 test images
    return config
