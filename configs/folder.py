# SPDX-License-Identifier: Apache-2.0
"""Your own data, without code: images/SPLIT, masks/SPLIT and classes.txt in one folder; the form of
classes.txt is described in digseg_jax/data/datasets/readers/folder.py.

    python -m digseg_jax.main --config=configs/folder.py --config.data.root=DIR --workdir=RUN

configs/folder.py:small starts from the shipped segmenter: two cores, nothing downloaded. Images are
seen with a short side of 128 pixels, so what is thinner than a thirtieth of an image is lost.

Without :small the model comes from the hub: Stable Diffusion 2.1, or another one of
digseg_jax/recipes.py, as in configs/folder.py:sd15_epsilon. That has not been run yet. Comments here
and in digseg_jax/recipes.py say where each setting is from.
"""

from digseg_jax.config import default
from digseg_jax.recipes import stable_diffusion

SMALL = "small"


def get_config(version: str = "sd21"):
    if version != SMALL:
        config = stable_diffusion(version, "folder", (SMALL,))
        config.train.steps = 10_000  # ours: some hundred images
        return config
    config = default()
    config.data.name = "folder"
    config.data.image_size = 128
    config.data.scale_min = 0.8
    config.data.scale_max = 1.5
    config.data.negative_rate = 0.2
    config.data.word_dropout = 0.5
    config.model.unet = "assets:segmenter"
    config.diffusion.terminal_fraction = 0.7
    config.loss.mask_weight = 0.2
    config.optim.learning_rate = 1e-3
    config.optim.ema_decay = 0.99
    config.train.steps = 1_000
    config.train.batch_size = 8
    config.checkpoint.every = 100
    config.eval.split = "val"
    config.eval.calibrate_split = "train"
    config.eval.calibrate_images = 24
    config.eval.ensemble = 2
    config.eval.steps = 1
    return config
