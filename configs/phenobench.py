# SPDX-License-Identifier: Apache-2.0
"""PhenoBench: soil, crop and weed, 1024x1024. Paper: images only, no numbers.

    python -m digseg_jax.main --config=configs/phenobench.py --config.data.root=DIR --workdir=RUN

The model comes from the hub: Stable Diffusion 2.1, or what digseg_jax/recipes.py has under
another name, as in configs/phenobench.py:sd15_epsilon.
Not run yet: neither the checkpoint nor the images were at hand. Whose choice a setting is: the comments
here and in digseg_jax/recipes.py.
"""

from digseg_jax.recipes import stable_diffusion


def get_config(version: str = "sd21"):
    config = stable_diffusion(version, "phenobench")
    config.data.num_queries = 2  # ours: three classes
    config.train.steps = 10_000  # ours: 1,407 images
    return config
