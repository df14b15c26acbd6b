# SPDX-License-Identifier: Apache-2.0
"""BDD100K, 19 classes of street scenes, 1280x720. Paper: images only, no numbers.

    python -m digseg_jax.main --config=configs/bdd100k.py --config.data.root=DIR --workdir=RUN

The model comes from the hub: Stable Diffusion 2.1, or what digseg_jax/recipes.py has under
another name, as in configs/bdd100k.py:sd15_epsilon.
Not run yet: neither the checkpoint nor the images were at hand. Whose choice a setting is: the comments
here and in digseg_jax/recipes.py.
"""

from digseg_jax.recipes import stable_diffusion


def get_config(version: str = "sd21"):
    config = stable_diffusion(version, "bdd100k")
    return config
