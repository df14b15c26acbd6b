# SPDX-License-Identifier: Apache-2.0
"""CamVid, 11 classes of street scenes, 480x360 (not in the paper).

    python -m digseg_jax.main --config=configs/camvid.py --config.data.root=DIR --workdir=RUN

The model comes from the hub: Stable Diffusion 1.5, or 2.1 with configs/camvid.py:sd21.
Not run yet: neither the checkpoint nor the images were at hand. Whose choice a setting is: the comments
here and in digseg_jax/recipes.py.
"""

from digseg_jax.recipes import stable_diffusion


def get_config(version: str = "sd15"):
    config = stable_diffusion(version, "camvid")
    config.data.image_size = 352  # ours: the images are 480x360
    config.train.steps = 10_000  # ours: 367 images
    return config
