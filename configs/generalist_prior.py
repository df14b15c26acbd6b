# SPDX-License-Identifier: Apache-2.0
"""A text-to-image latent diffusion model on the images of the generalist's domains.

    python -m digseg_jax.main --config=configs/generalist_prior.py --config.data.root=DIR --workdir=RUN

A generalist can start from it, with --config.model.unet=RUN/export, instead of from a segmenter: then
its network has seen the images of all domains, under names, and no mask. Captions are made from the
labels: the names of the classes that fill most of a crop. Data, scales and versions are those of
configs/generalist.py.
"""

from digseg_jax.recipes import on_domains


def get_config(version: str = "all"):
    config = on_domains(version, scored=False)
    config.task = "prior"
    config.data.image_size = 128
    config.diffusion.timestep_sampling = "uniform"
    config.train.steps = 100_000
    config.train.batch_size = 16
    return config
