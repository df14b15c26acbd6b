# SPDX-License-Identifier: Apache-2.0
"""DeepGlobe roads, 1024x1024, the research split. Paper: IoU 65.78, precision 79.93, recall 78.92.

    python -m digseg_jax.main --config=configs/deepglobe.py --config.data.root=DIR --workdir=RUN

The model comes from the hub: Stable Diffusion 2.1, or another one of digseg_jax/recipes.py, as in
configs/deepglobe.py:sd15_epsilon. Comments in both files say where each setting is from.
Not run yet.
"""

from digseg_jax.recipes import stable_diffusion


def get_config(version: str = "sd21"):
    config = stable_diffusion(version, "deepglobe")
    config.data.num_queries = 1  # ours: two classes
    config.eval.split = "test"  # ours: the split of 4,696 and 1,530; the paper does not name its own
    return config
