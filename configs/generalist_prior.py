# SPDX-License-Identifier: Apache-2.0
"""A text-to-image latent diffusion model on the images of the generalist's domains.

    python -m digseg_jax.main --config=configs/generalist_prior.py --config.data.root=DIR --workdir=RUN

A generalist can start from it, with --config.model.unet=RUN/export, instead of from a segmenter: then
its network has seen the images of all domains, under names, and no mask. Captions are made from the
labels: the names of the classes that fill most of a crop. Data, scales and versions are those of
configs/generalist.py. As there, every checkpoint can be used.
"""

from digseg_jax.config import default
from digseg_jax.data.datasets.domains import DOMAINS, shareable_domains
from digseg_jax.errors import UserError

VERSIONS = {"all": DOMAINS, "shareable": shareable_domains()}


def get_config(version: str = "all"):
    if version not in VERSIONS:
        raise UserError(
            f"--config: no version {version!r}; legal after the colon: {', '.join(VERSIONS)}"
        )
    config = default()
    config.task = "prior"
    config.data.mixture = tuple(domain.part() for domain in VERSIONS[version])
    config.data.image_size = 128
    config.diffusion.timestep_sampling = "uniform"
    config.optim.learning_rate = 1e-3
    config.optim.warmup_steps = 500
    config.optim.schedule = "constant"
    config.optim.ema_decay = 0.9995
    config.train.steps = 100_000
    config.train.batch_size = 16
    config.logging.every = 50
    config.checkpoint.every = 250
    config.checkpoint.keep_every = 5_000
    return config
