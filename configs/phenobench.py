# SPDX-License-Identifier: Apache-2.0
"""PhenoBench: soil, crop and weed, 1024x1024. Paper: images only, no numbers.

    python -m digseg_jax.main --config=configs/phenobench.py --config.data.root=DIR --workdir=RUN

The model comes from the hub: Stable Diffusion 2.1, or another one of digseg_jax/recipes.py, as in
configs/phenobench.py:sd15_epsilon. Comments in both files say where each setting is from.
Not run yet.
"""

from digseg_jax.recipes import stable_diffusion


def get_config(version: str = "sd21"):
    config = stable_diffusion(version, "phenobench")
    config.data.num_queries = 2  # ours: three classes
    config.train.steps = 10_000  # ours: 1,407 images
    return config
