# SPDX-License-Identifier: Apache-2.0
"""BDD100K, 19 classes of street scenes, 1280x720. Paper: images only, no numbers.

    python -m digseg_jax.main --config=configs/bdd100k.py --config.data.root=DIR --workdir=RUN

The model comes from the hub: Stable Diffusion 2.1, or another one of digseg_jax/recipes.py, as in
configs/bdd100k.py:sd15_epsilon. Comments in both files say where each setting is from.
Not run yet.
"""

from digseg_jax.recipes import stable_diffusion


def get_config(version: str = "sd21"):
    config = stable_diffusion(version, "bdd100k")
    return config
