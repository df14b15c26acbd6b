# SPDX-License-Identifier: Apache-2.0
r"""Open vocabulary on two cores: named photographs on backgrounds, a fifth of the names never trained.

    apt-get download tuxpaint-stamps-default && dpkg -x tuxpaint-stamps-default_*.deb STAMPS
    python -m tests.bench.stamp_data --stamps=STAMPS --out=DATA
    python -m digseg_jax.main --config=tests/bench/stamps_config.py \
        --config.data.root=DATA/seen --workdir=RUN
    python -m tests.bench stamps --weights=RUN/export --root=DATA

The figures that count are the bench's. The evaluation at the end of training asks for all 250 names on
eight scenes only: some five seconds a scene on two busy cores, and 3.0 GB at the peak of the run.
"background" is a name like any other here, so that what lies around a stamp counts as not being it; as
the commonest one it is drawn for 2 % of the queries.

Measured (seed 0, 1x1, 200 scenes of each set, no calibration), trained in 50 minutes on one busy core;
mean IoU of the object a name asks for, and of that with the name of another one in the image:
    seen names    217: 0.611 (standard error 0.014) against 0.046; mostly on the right object in 89 %
    unseen names   56: 0.162 (0.030) against 0.068; in 38 %, of two or three objects a scene
Names absent from an image paint 2.1 to 2.4 % of it.
"""

from digseg_jax.config import default


def get_config():
    config = default()
    config.data.name = "folder"
    config.data.image_size = 64
    config.data.scale_min = 1.0
    config.data.scale_max = 1.0
    config.data.class_share_cap = 1.0
    config.data.jitter = 0.3
    config.data.num_queries = 2
    config.data.negative_rate = 0.25
    config.data.text_noise = 0.2
    config.data.word_dropout = 0.5
    config.model.unet = "assets:segmenter"
    config.model.sentence_token = True  # all that word_dropout leaves of a name
    config.diffusion.terminal_fraction = 0.7
    config.loss.mask_weight = 0.2
    config.optim.learning_rate = 1e-3
    config.optim.ema_decay = 0.998
    config.train.steps = 3000
    config.train.batch_size = 8
    config.checkpoint.every = 200
    config.eval.split = "val"
    config.eval.calibrate = False
    config.eval.ensemble = 1
    config.eval.steps = 1
    config.eval.num_images = 8
    return config
