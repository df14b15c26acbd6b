# SPDX-License-Identifier: Apache-2.0
"""ADE20K-847, supervised (ours). In the paper it is only evaluated, by a model
trained as configs/coco_stuff.py. Paper: mIoU 19.9 (ViT-L/14).

    python -m digseg_jax.main --config=configs/ade20k_847.py --config.data.root=DIR --workdir=RUN

The model comes from the hub: Stable Diffusion 2.1, or another one of digseg_jax/recipes.py, as in
configs/ade20k_847.py:sd15_epsilon. Comments in both files say where each setting is from.
Not run yet.
"""

from digseg_jax.recipes import stable_diffusion


def get_config(version: str = "sd21"):
    config = stable_diffusion(version, "ade20k_847")
    config.data.num_queries = 8  # ours: many classes, most of them rare
    return config
