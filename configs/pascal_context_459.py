# SPDX-License-Identifier: Apache-2.0
r"""PASCAL-Context-459, supervised (ours). In the paper it is only evaluated, by a model
trained as configs/coco_stuff.py. Paper: mIoU 29.2.

    python -m digseg_jax.main --config=configs/pascal_context_459.py --workdir=RUN \
      --config.data.root=DIR

The model comes from the hub: Stable Diffusion 2.1, or another one of digseg_jax/recipes.py, as in
configs/pascal_context_459.py:sd15_epsilon. Comments in both files say where each setting is from.
Not run yet.
"""

from digseg_jax.recipes import stable_diffusion


def get_config(version: str = "sd21"):
    config = stable_diffusion(version, "pascal_context_459")
    config.data.num_queries = 8  # ours: many classes, most of them rare
    config.train.steps = 20_000  # ours: 4,998 images
    return config
