# SPDX-License-Identifier: Apache-2.0
"""The long land-cover recipe with the prompted codec: any named classes in one pass, as colors.

As configs/landcover_palette.py, but the classes are named in words, up to `data.num_queries` for each
image, and each is painted in a color that is drawn anew for every example. What was not named gets the
background's color. `data.negative_rate` is the share of names for classes that are not there.
Ours: the paper does not say how its colored masks are asked for.

It starts from the shipped segmenter, which knows what the words look like; what is new is that a name
brings a color. For some 700 steps the network paints a mean of the named colors, then it tells them
apart (tests/bench/RESULTS.md). From the text-to-image prior, at a learning rate of 1e-3, it had not
after 600 steps. Names are thinned out in every example: where all are always named, their colors are
always the same set, and their mean tells the network nothing about the color of a name.
"""

from digseg_jax.recipes import land_cover


def get_config():
    config = land_cover()
    config.model.codec = "prompted"
    config.model.unet = "assets:segmenter"
    config.data.num_queries = 8
    config.data.negative_rate = 0.5
    config.data.name_dropout = 1.0
    config.data.text_noise = 0.2
    config.diffusion.terminal_fraction = 0.7
    config.loss.mask_weight = 0.3
    config.optim.learning_rate = 3e-4
    config.optim.b2 = 0.999
    config.optim.ema_decay = 0.998
    config.train.steps = 2600
    config.train.batch_size = 8
    config.checkpoint.every = 100
    config.eval.decoder = "probe"
    config.eval.view_size = (128,)  # a tile
    config.eval.ensemble = 8  # every member has the colors shifted: they bring 2 to 6 points of mIoU
    config.eval.steps = 1
    return config
