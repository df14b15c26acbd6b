# SPDX-License-Identifier: Apache-2.0
"""TAESD: sizes, its place as `model.vae`, and what its config may say."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.models.vae_tiny import AutoencoderTiny, TinyVaeConfig
from digseg_jax.training.tasks.parts import load_vae
from digseg_jax.weights import load_component, load_config, save_component

SMALL = TinyVaeConfig(
    encoder_block_out_channels=(8, 8, 8),
    decoder_block_out_channels=(8, 8, 8),
    num_encoder_blocks=(1, 1, 1),
    num_decoder_blocks=(1, 1, 1),
)


@pytest.fixture
def folder(tmp_path):
    params = tiny.random_params(AutoencoderTiny, SMALL, seed=0)
    save_component((SMALL, params), tmp_path)
    return tmp_path


def test_published_number_of_parameters():
    _, params = functional.abstract(
        lambda: AutoencoderTiny(TinyVaeConfig(), rngs=functional.FixedRngs())
    )
    sizes = {side: sum(x.size for x in jax.tree.leaves(tree)) for side, tree in params.items()}

    def conv(cin, cout, bias=True):
        return 9 * cin * cout + bias * cout

    blocks, resampling = 10 * 3 * conv(64, 64), 3 * conv(64, 64, bias=False)
    assert sizes["encoder"] == conv(3, 64) + blocks + resampling + conv(64, 4)
    assert sizes["decoder"] == conv(4, 64) + blocks + resampling + conv(64, 3)


def test_shapes_and_range(folder):
    model = load_component(folder)
    latent = model.encode(jnp.zeros((2, 16, 24, 3))).mean
    assert model.config.factor == 4 and latent.shape == (2, 4, 6, 4)
    assert model.decode(latent).shape == (2, 16, 24, 3)


def test_large_latents_saturate(folder):
    decode = load_component(folder).decode
    np.testing.assert_allclose(
        decode(jnp.full((1, 2, 2, 4), 50.0)), decode(jnp.full((1, 2, 2, 4), 500.0)), rtol=1e-6
    )


def test_a_run_may_name_it_as_its_autoencoder(folder, folders):
    config = tiny.config(folders, model__vae=str(folder))
    vae, params = load_vae(config.model, config.compute)
    image = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype(np.float32)
    model = load_component(folder)
    latent = vae.encode(params, image)
    # published with scaling factor 1: its latents are what the U-Net sees
    np.testing.assert_allclose(latent, model.encode(image).mean, rtol=1e-6)
    np.testing.assert_allclose(vae.decode(params, latent), model.decode(latent), rtol=1e-6)


def test_a_run_refuses_what_is_no_autoencoder(folders):
    config = tiny.config(folders, model__vae=folders["unet"])
    with pytest.raises(UserError, match="UNet2D.*expected AutoencoderKL or AutoencoderTiny"):
        load_vae(config.model, config.compute)


def test_config_survives_a_round_trip(folder):
    assert load_config(folder) == SMALL


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoder_block_out_channels": [8, 16]}, "encoder_block_out_channels.*4 equal widths"),
        ({"decoder_block_out_channels": [8, 8, 8, 16]}, "decoder_block_out_channels.*equal"),
        ({"num_decoder_blocks": [1], "decoder_block_out_channels": [8]}, "num_decoder_blocks"),
        ({"act_fn": "silu"}, "act_fn='silu'"),
        ({"upsampling_scaling_factor": 4}, "upsampling_scaling_factor=4"),
        ({"shift_factor": 0.1}, "shift_factor=0.1"),
    ],
)
def test_what_the_port_does_not_compute_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        TinyVaeConfig.from_dict(values)
