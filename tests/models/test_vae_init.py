# SPDX-License-Identifier: Apache-2.0
"""An autoencoder that starts with an exact path for colors."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from digseg_jax import trees
from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.models.vae import AutoencoderKL, VaeConfig
from digseg_jax.models.vae_init import COLOR_TO_LATENT, carry_colors

CONFIG = VaeConfig(
    block_out_channels=(16, 16, 32),
    layers_per_block=1,
    norm_num_groups=2,
    mid_block_add_attention=False,
)


def started(config=CONFIG):
    graphdef, abstract = functional.abstract(lambda: AutoencoderKL(config, rngs=functional.FixedRngs()))
    params = functional.random_init(abstract, 3)
    return graphdef, params, carry_colors(params, config)


def pictures():
    """Smooth ones with every brightness and hue, values in [-0.9, 0.9]."""
    coarse = np.random.default_rng(0).uniform(-0.9, 0.9, (2, 4, 4, 3)).astype(np.float32)
    return coarse.repeat(8, 1).repeat(8, 2)


def test_latents_are_the_cells_mean_colors():
    graphdef, _, params = started()
    image = pictures()
    posterior = functional.merge(graphdef, params).encode(jnp.asarray(image))
    cells = image.reshape(2, 8, 4, 8, 4, 3).mean(axis=(2, 4))
    error = np.abs(np.asarray(posterior.mean)[..., :3] - cells @ COLOR_TO_LATENT.T)
    assert error.max() < 0.03 * np.abs(COLOR_TO_LATENT).max()
    np.testing.assert_allclose(posterior.logvar, -6.0, atol=1e-5)


def test_the_round_trip_repeats_the_cells_colors_which_random_weights_do_not():
    graphdef, random, params = started()
    image = pictures()
    error = {
        name: np.abs(np.asarray(functional.merge(graphdef, p)(jnp.asarray(image))) - image).mean()
        for name, p in (("started", params), ("random", random))
    }
    assert error["started"] < 0.03 < 0.2 < error["random"]


def test_the_rest_stays_random_and_the_arguments_untouched():
    _, random, params = started()
    before, after = trees.flatten(random), trees.flatten(params)
    assert before.keys() == after.keys()
    name = "encoder.mid_block.resnets.0.conv1.kernel"
    np.testing.assert_array_equal(before[name], after[name])
    assert np.any(before["encoder.mid_block.resnets.0.conv2.kernel"])
    assert not np.any(after["encoder.mid_block.resnets.0.conv2.kernel"])


@pytest.mark.parametrize(
    "change", [{"norm_num_groups": 4}, {"block_out_channels": (4, 16, 32)}, {"latent_channels": 2}]
)
def test_an_architecture_without_room_is_refused(change):
    with pytest.raises(UserError, match="a color path needs 8 channels"):
        carry_colors({}, dataclasses.replace(CONFIG, **change))
