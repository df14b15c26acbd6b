# SPDX-License-Identifier: Apache-2.0
"""The small autoencoder that the land-cover models work in: images and binary masks, factor 8.

Made once and shipped as digseg_jax/assets/vae. Training imagery: training blocks only.
"""

from digseg_jax.config import default


def get_config():
    config = default()
    config.task = "autoencoder"
    config.data.image_size = 64
    config.data.num_queries = 1
    config.data.negative_rate = 0.05
    config.data.repeat_threshold = 0.3
    config.data.train_label_sets = ("groups", "igbp")
    config.optim.learning_rate = 2e-3
    config.optim.warmup_steps = 100
    config.optim.ema_decay = 0.99
    config.train.steps = 2200
    config.train.batch_size = 8
    config.checkpoint.every = 400
    return config
