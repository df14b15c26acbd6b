# SPDX-License-Identifier: Apache-2.0
"""A small text-to-image latent diffusion model on captioned land-cover tiles: the prior.

Made once and shipped as digseg_jax/assets/prior. Training imagery: training blocks only.
"""

from digseg_jax.recipes import land_cover


def get_config():
    config = land_cover()
    config.task = "prior"
    config.diffusion.timestep_sampling = "uniform"
    config.optim.learning_rate = 1e-3
    config.optim.ema_decay = 0.995
    config.train.steps = 1300
    config.train.batch_size = 16
    config.checkpoint.every = 200
    return config
