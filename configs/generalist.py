# SPDX-License-Identifier: Apache-2.0
"""One set of weights for photographs, streets, cells and land: a mixture of data sets, asked in words.

    python -m digseg_jax.main --config=configs/generalist.py --config.data.root=DIR --workdir=RUN

DIR holds a folder for each data set of digseg_jax/data/datasets/domains.py, where their scales, weights
and terms stand; the land cover needs none. Several of them are for research only, and so are weights
that were trained on them. configs/generalist.py:shareable trains only on those whose terms allow
derived weights to be passed on: photographs, streets, cells and land, but no clothing, retinas, fields,
cracks or aerial roads. The evaluation at the end scores the land cover alone; --suite=domains scores
every domain.

configs/generalist.py:DOMAIN (configs/generalist.py:camvid) trains a specialist on one domain, with the
crops that it has in the mixture, for a fifteenth of the mixture's steps, and scores that domain.
"""

from digseg_jax.recipes import on_domains


def get_config(version: str = "all"):
    config = on_domains(version)
    many = len(config.data.mixture) > 1
    config.data.image_size = 96
    config.data.num_queries = 1  # a second one of the same crop teaches less than another crop
    # Two of five negatives of a mixture are classes of the image's own data set.
    config.data.negative_rate = 0.35 if many else 0.25
    config.data.foreign_rate = 0.6 if many else 0.0
    config.data.text_noise = 0.3
    config.data.word_dropout = 0.5
    config.model.unet = "assets:segmenter"
    config.diffusion.terminal_fraction = 0.7
    config.loss.mask_weight = 0.2
    config.train.steps = 21_300 if many else 1_420
    config.train.batch_size = 16
    config.optim.cooldown_steps = 2_900 if many else 400
    if not many:
        config.optim.warmup_steps = 50
        config.optim.ema_decay = 0.998
    config.eval.calibrate = False
    config.eval.view_size = (128,)
    config.eval.ensemble = 1
    config.eval.steps = 1
    return config
