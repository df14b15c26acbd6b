# SPDX-License-Identifier: Apache-2.0
"""REFUGE2 optic disc and cup; the disc contains the cup. Paper: images only, no numbers.

    python -m digseg_jax.main --config=configs/refuge2.py --config.data.root=DIR --workdir=RUN

The model comes from the hub: Stable Diffusion 2.1, or another one of digseg_jax/recipes.py, as in
configs/refuge2.py:biomedclip. Comments in both files say where each setting is from.
Not run yet.
"""

from digseg_jax.recipes import stable_diffusion


def get_config(version: str = "sd21"):
    config = stable_diffusion(version, "refuge2")
    config.data.num_queries = 2  # ours: three classes
    config.train.steps = 10_000  # ours: 400 images
    config.eval.split = "test"  # ours: val and test come from another camera than train
    return config
