# SPDX-License-Identifier: Apache-2.0
"""CamVid, 11 classes of street scenes, 480x360 (not in the paper): two cores, nothing downloaded.

    python -m digseg_jax.main --config=configs/camvid.py --config.data.root=DIR --workdir=RUN

starts from the shipped land-cover segmenter and its autoencoder, and paints all classes in one pass.
configs/camvid.py:binary asks for one class at a time; :sd15 and :sd21 start from Stable Diffusion, from
the hub, for an accelerator. Whose choice a setting of those is: the comments here and in
digseg_jax/recipes.py.

Measured, palette: 8,000 steps in 2 h 11 min on one core; the 101 images of val,
biases from 48 of train, 1x1: mIoU 0.432, accuracy 0.835; road 0.91, tree 0.83, sky 0.79, building 0.71,
pavement 0.66, car 0.48, fence 0.20, pedestrian 0.07, bicyclist 0.06, sign 0.04, pole 0.00. With four
members 0.433. Read through the decoder instead of from the latents 0.370 and 0.739. Latent cells are
four pixels of an image of 160x120: what is thinner than a cell is lost, and a band of a third class
lies on some borders. The autoencoder lets 0.64 of palette masks through at 128 pixels, 0.71 at 192.

Binary: 1.4 s a step on two idle cores (2.3 s on one): 2 hours 20 minutes. A run of 3,400 steps,
stopped after 2,200 (85 minutes on one core), has 0.281 and 0.671; it was not run to its end.
"""

from digseg_jax import recipes
from digseg_jax.config import default

SMALL = ("palette", "binary")


def get_config(version: str = "palette"):
    if version not in SMALL:
        config = recipes.stable_diffusion(version, "camvid", SMALL)
        config.data.image_size = 384  # ours: the images are 480x360, sides are multiples of 64
        config.train.steps = 10_000  # ours: 367 images
        return config
    config = default()
    config.data.name = "camvid"
    # images are segmented whole, at 160x120; crops show 60 to 100 % of their height
    config.data.image_size = 96
    config.data.scale_min = 1.0
    config.data.scale_max = 1.7
    config.eval.short_side = 120
    config.eval.view_size = (128, 160)  # what the network can halve
    config.data.negative_rate = 0.2
    config.model.unet = "assets:segmenter"
    config.diffusion.terminal_fraction = 0.7
    config.optim.learning_rate = 1e-3
    config.optim.ema_decay = 0.998
    config.train.steps = 6000
    config.train.batch_size = 8
    config.checkpoint.every = 200
    config.eval.split = "val"
    config.eval.calibrate_split = "train"
    config.eval.calibrate_images = 48
    config.eval.ensemble = 1
    config.eval.steps = 1
    if version == "palette":
        config.model.codec = "palette"
        config.data.num_queries = 1
        config.loss.mask_weight = 0.3
        config.diffusion.terminal_fraction = 0.9
        config.eval.decoder = "probe"
        config.train.steps = 8000
        return config
    config.data.num_queries = 2
    config.loss.mask_weight = 0.2
    return config
