# SPDX-License-Identifier: Apache-2.0
"""Your own data, without code: images/SPLIT, masks/SPLIT and classes.txt in one folder; the form of
classes.txt is told in digseg_jax/data/datasets/readers/folder.py.

    python -m digseg_jax.main --config=configs/folder.py --config.data.root=DIR --workdir=RUN

The model comes from the hub: Stable Diffusion 2.1, or what digseg_jax/recipes.py has under
another name, as in configs/folder.py:sd15_epsilon.
Not run yet: neither the checkpoint nor the images were at hand. Whose choice a setting is: the comments
here and in digseg_jax/recipes.py.
"""

from digseg_jax.recipes import stable_diffusion


def get_config(version: str = "sd21"):
    config = stable_diffusion(version, "folder")
    config.train.steps = 10_000  # ours: some hundred images
    return config
