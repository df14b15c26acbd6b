# SPDX-License-Identifier: Apache-2.0
"""Every way to convolve on a CPU is XLA's convolution, forward and backward, up to rounding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from digseg_jax.models.functional import FixedRngs
from digseg_jax.models.kernels import conv
from digseg_jax.models.layers import Compute, Conv

RNG = np.random.default_rng(0)
NONE = ((0, 0), (0, 0))


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


# b h w c, then i j c d: what each is an example of
CASES = {
    "winograd": ((2, 32, 32, 192), (3, 3, 192, 192), conv.SAME),
    "winograd, not square": ((1, 64, 36, 192), (3, 3, 192, 200), conv.SAME),
    "a width that is no multiple of the tile": ((1, 64, 34, 192), (3, 3, 192, 192), conv.SAME),
    "few channels": ((2, 32, 32, 8), (3, 3, 8, 12), conv.SAME),
    "smaller than its kernel": ((1, 4, 3, 192), (3, 3, 192, 200), conv.SAME),
    "one cell": ((1, 1, 1, 192), (3, 3, 192, 192), conv.SAME),
    "a phase of a folded kernel": ((2, 9, 23, 192), (2, 2, 192, 194), ((1, 0), (0, 1))),
    "such a phase, small": ((1, 3, 2, 194), (2, 2, 194, 192), ((0, 1), (1, 0))),
    "1x1": ((2, 5, 3, 7), (1, 1, 7, 4), NONE),
    "no padding": ((2, 16, 15, 192), (3, 3, 192, 193), NONE),
}


def relative(own, other):
    return float(jnp.linalg.norm(own - other) / jnp.linalg.norm(other))


@pytest.mark.parametrize("case", CASES)
def test_convolution_and_gradients_are_those_of_xla(case):
    shape, size, padding = CASES[case]
    x, kernel = draw(*shape), draw(*size)

    def both(function):
        y, backward = jax.vjp(lambda x, kernel: function(x, kernel, padding), x, kernel)
        return y, *backward(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    own, other = jax.jit(both, static_argnums=0)(conv.conv), both(conv.xla_conv)
    for a, b in zip(own, other, strict=True):
        assert a.shape == b.shape
        assert relative(a, b) < 5e-6


@pytest.mark.parametrize("case", ["winograd", "winograd, not square"])
def test_large_maps_take_half_the_products(case):
    shape, size, padding = CASES[case]
    x, kernel = draw(*shape), draw(*size)
    flops = [
        jax.jit(f, static_argnums=2).lower(x, kernel, padding).compile().cost_analysis()["flops"]
        for f in (conv.conv, conv.xla_conv)
    ]
    assert flops[0] < 0.6 * flops[1]


def test_winograd_is_as_exact_as_its_paper_says():
    """Some 1e-6 of the result, against numbers of twice the digits."""
    x, kernel = draw(1, 32, 64, 192), draw(3, 3, 192, 4)
    with jax.enable_x64():
        wide = conv.xla_conv(x.astype(jnp.float64), kernel.astype(jnp.float64), conv.SAME)
        wide = np.asarray(wide)  # before the mode ends
    own = np.asarray(conv.winograd_conv(x, kernel))
    assert np.linalg.norm(own - wide) < 3e-6 * np.linalg.norm(wide)


def test_a_small_map_is_one_product_of_matrices():
    shape, size, padding = CASES["smaller than its kernel"]
    lowered = jax.jit(conv.conv, static_argnums=2).lower(draw(*shape), draw(*size), padding)
    assert "convolution" not in lowered.as_text()


def test_sixteen_bits_are_left_to_xla():
    compute = Compute(dtype=jnp.bfloat16, conv="cpu")
    layer = Conv(192, 192, compute=compute, rngs=FixedRngs())
    text = jax.jit(lambda x: layer(x)).lower(jnp.ones((2, 32, 32, 192))).as_text()
    assert text.count("stablehlo.convolution") == 1
