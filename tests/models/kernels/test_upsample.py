# SPDX-License-Identifier: Apache-2.0
"""The convolution of a doubled map is the same number, made or folded, as every model is either way."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from digseg_jax.models import functional
from digseg_jax.models.kernels.upsample import doubled_conv, folded_conv, upsample_nearest
from digseg_jax.models.unet import UNet2DConditionModel
from digseg_jax.models.vae import AutoencoderKL
from digseg_jax.models.vae_tiny import AutoencoderTiny, TinyVaeConfig

RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def made(x, kernel):
    return jax.lax.conv_general_dilated(
        upsample_nearest(x),
        kernel,
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def test_nearest_doubling_repeats_rows_and_columns():
    x = draw(2, 3, 5, 4)
    np.testing.assert_array_equal(upsample_nearest(x), np.asarray(x).repeat(2, 1).repeat(2, 2))


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (1, 1, 1, 2), (1, 2, 7, 3)])
def test_folded_is_the_convolution_of_the_doubled_map(shape):
    x, kernel = draw(*shape), draw(3, 3, shape[-1], 6)
    np.testing.assert_allclose(folded_conv(x, kernel), made(x, kernel), atol=1e-5)


@pytest.mark.parametrize("side, convolutions", [(2, 1), (16, 4)])
def test_a_large_map_is_folded_and_a_small_one_made(side, convolutions):
    x, kernel = draw(1, side, side, 4), draw(3, 3, 4, 6)
    lowered = jax.jit(doubled_conv).lower(x, kernel).as_text()
    assert lowered.count("stablehlo.convolution") == convolutions
    np.testing.assert_allclose(doubled_conv(x, kernel), made(x, kernel), atol=1e-5)


def test_so_are_its_gradients():
    x, kernel, cotangent = draw(2, 4, 3, 5), draw(3, 3, 5, 2), draw(2, 8, 6, 2)
    own, other = (jax.vjp(f, x, kernel)[1](cotangent) for f in (folded_conv, made))
    for a, b in zip(own, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


TAESD = TinyVaeConfig(
    encoder_block_out_channels=(8, 8),
    decoder_block_out_channels=(8, 8),
    num_encoder_blocks=(1, 1),
    num_decoder_blocks=(1, 1),
)


@pytest.mark.parametrize(
    "model_class, config, call",
    [
        (AutoencoderKL, tiny.VAE, lambda m: m.decode(jnp.ones((1, 12, 12, 4)))),
        (AutoencoderTiny, TAESD, lambda m: m.decode(jnp.ones((1, 12, 12, 4)))),
        (
            UNet2DConditionModel,
            tiny.UNET,
            lambda m: m(jnp.ones((1, 8, 8, 4)), jnp.ones(1), jnp.ones((1, 3, 8)), None),
        ),
    ],
)
def test_models_give_the_same_either_way(model_class, config, call):
    params = tiny.random_params(model_class, config, seed=3)
    outputs, programs = [], []
    for conv in ("xla", "cpu"):
        model = model_class(config, rngs=functional.FixedRngs(), conv=conv)
        graphdef, _ = functional.split(model)
        run = jax.jit(lambda p, g=graphdef: call(functional.merge(g, p)))
        outputs.append(run(params))
        programs.append(run.lower(params).as_text().count("stablehlo.convolution"))
    assert programs[0] != programs[1]
    np.testing.assert_allclose(*outputs, atol=1e-5)


def test_cpus_fold(folders):
    assert tiny.for_devices(tiny.config(folders), jax.devices("cpu")).compute.conv == "cpu"


def test_another_choice_stays(folders):
    config = tiny.config(folders, compute__conv="xla")
    assert tiny.for_devices(config, jax.devices("cpu")).compute.conv == "xla"
