# SPDX-License-Identifier: Apache-2.0
"""PASCAL-Context-59, supervised (ours). In the paper it is only evaluated, by a model
trained as configs/coco_stuff.py. Paper: mIoU 68.4.

    python -m digseg_jax.main --config=configs/pascal_context_59.py --config.data.root=DIR --workdir=RUN

The model comes from the hub: Stable Diffusion 2.1, or another one of digseg_jax/recipes.py, as in
configs/pascal_context_59.py:sd15_epsilon. Comments in both files say where each setting is from.
Not run yet.
"""

from digseg_jax.recipes import stable_diffusion


def get_config(version: str = "sd21"):
    config = stable_diffusion(version, "pascal_context_59")
    config.train.steps = 20_000  # ours: 4,998 images
    return config
