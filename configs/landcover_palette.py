# SPDX-License-Identifier: Apache-2.0
"""The long land-cover recipe with the palette codec: all eight classes in one pass, as colors.

Trained on the same tiles as configs/landcover.py, for a comparison of the two codecs. One image per
image instead of one per query: a step costs about half, an evaluation about an eighth.
Measured, the whole recipe on one core, 81 held-out tiles: read from the latents by the nearest
color (`eval.decoder=probe`, 1x1) mIoU 0.490, accuracy 0.801; through the decoder (`vae`, 4x2) 0.397
and 0.736. The auxiliary loss trains what the former reads: where the U-Net is unsure between two
colors, the decoder paints a third one. The binary codec's recipe has 0.547 and 0.858 (2x2).

`python -m digseg_jax.tools.check_codec` tells, before anything is trained, what the autoencoder lets
through.
"""

from digseg_jax.recipes import land_cover


def get_config():
    config = land_cover()
    config.model.codec = "palette"
    config.data.num_queries = 1
    config.diffusion.terminal_fraction = 0.7
    config.loss.mask_weight = 0.3
    config.optim.learning_rate = 1e-3
    config.optim.ema_decay = 0.998
    config.train.steps = 2600
    config.train.batch_size = 8
    config.checkpoint.every = 200
    config.eval.decoder = "probe"
    config.eval.view_size = (128,)  # a tile
    config.eval.ensemble = 1
    config.eval.steps = 1
    return config
