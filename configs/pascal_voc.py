# SPDX-License-Identifier: Apache-2.0
"""PASCAL VOC-20, supervised (ours); not in the paper's tables.

    python -m digseg_jax.main --config=configs/pascal_voc.py --config.data.root=DIR --workdir=RUN

The model comes from the hub: Stable Diffusion 2.1, or what digseg_jax/recipes.py has under
another name, as in configs/pascal_voc.py:sd15_epsilon.
Not run yet: neither the checkpoint nor the images were at hand. Whose choice a setting is: the comments
here and in digseg_jax/recipes.py.
"""

from digseg_jax.recipes import stable_diffusion


def get_config(version: str = "sd21"):
    config = stable_diffusion(version, "pascal_voc")
    config.train.steps = 10_000  # ours: 1,464 images
    return config
