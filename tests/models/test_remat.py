# SPDX-License-Identifier: Apache-2.0
"""What a rematerialized block keeps beside its input."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend import core
from jax.interpreters import partial_eval

from digseg_jax.models import functional, partition
from digseg_jax.models.attention import Transformer2DModel
from digseg_jax.models.kernels import attention as attention_kernels
from digseg_jax.models.kernels import feed_forward
from digseg_jax.models.layers import Compute
from digseg_jax.models.partition import LocalAttention, local_feed_forward
from digseg_jax.models.resnet import ResnetBlock2D

KERNELS = ("splash_mha_fwd", "cross_attention_forward", "feed_forward_forward")


def gradient(remat: str):
    """(function, arguments): gradients of a transformer whose three kernels are interpreted."""
    attention = LocalAttention(partial(attention_kernels.splash, interpret=True))
    compute = Compute(attention=attention, remat=remat, feed_forward=local_feed_forward)
    model = Transformer2DModel(
        32, 24, 2, layers=1, groups=8, linear_projection=True, compute=compute, rngs=nnx.Rngs(0)
    )
    graphdef, params = functional.split(model)
    keys = jax.random.split(jax.random.key(1))
    x, text = jax.random.normal(keys[0], (1, 16, 16, 32)), jax.random.normal(keys[1], (1, 7, 24))

    def loss(params, x):
        return jnp.square(functional.merge(graphdef, params)(x, text, None)).sum()

    return jax.grad(loss, argnums=(0, 1)), (params, x)


def equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """All, inner ones too, but those of a Pallas kernel."""
    for equation in jaxpr.eqns:
        yield equation
        if equation.primitive.name == "pallas_call":
            continue
        for inner in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda value: isinstance(value, core.Jaxpr | core.ClosedJaxpr),
        ):
            if isinstance(inner, core.ClosedJaxpr):
                yield from equations(inner.jaxpr)
            elif isinstance(inner, core.Jaxpr):
                yield from equations(inner)


def used(function: Callable[..., Any], *arguments: Any) -> list[core.JaxprEqn]:
    """The equations whose results are used: the others, XLA leaves out too."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return list(equations(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]))


def kernels(equations: list[core.JaxprEqn]) -> collections.Counter:
    """How often each kernel is called."""
    found = collections.Counter()
    for equation in equations:
        if equation.primitive.name == "pallas_call":
            told = str({k: v for k, v in equation.params.items() if k != "jaxpr"})
            found.update(kernel for kernel in KERNELS if kernel in told)
    return found


def count(equations: list[core.JaxprEqn], primitive: str, shape: tuple[int, ...]) -> int:
    """Of a primitive's calls with a result of that shape."""
    named = [e for e in equations if e.primitive.name == primitive]
    return sum(e.outvars[0].aval.shape == shape for e in named)


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(partition, "fused", partial(feed_forward.fused, interpret=True))


@pytest.mark.parametrize("mode", ["none", "block", "large", "dots"])
def test_no_kernel_of_the_forward_pass_runs_twice(interpreted, mode):
    function, arguments = gradient(mode)
    assert kernels(used(function, *arguments)) == dict.fromkeys(KERNELS, 1)


@pytest.mark.parametrize("mode", ["none", "block", "large", "dots"])
def test_the_text_is_projected_once(interpreted, mode):
    function, arguments = gradient(mode)
    assert count(used(function, *arguments), "dot_general", (1, 7, 32)) == 2  # keys and values


@pytest.mark.parametrize("mode", ["none", "block", "large", "dots"])
def test_a_resnet_convolves_once_and_takes_statistics_once(mode):
    compute = Compute(remat=mode)
    options = {"groups": 8, "eps": 1e-5, "time_features": 12, "compute": compute}
    graphdef, params = functional.split(ResnetBlock2D(32, 32, rngs=nnx.Rngs(0), **options))

    def loss(params, x, time):
        return jnp.square(functional.merge(graphdef, params)(x, time)).sum()

    arguments = params, jnp.ones((2, 16, 16, 32)), jnp.ones((2, 12))
    found = used(jax.grad(loss, argnums=(0, 1)), *arguments)
    assert count(found, "dot_general", (2, 32)) == 1
    assert count(found, "rsqrt", (2, 32)) == 2  # of its two norms
    convolutions = [e for e in found if e.primitive.name == "conv_general_dilated"]
    assert len(convolutions) == 2 * 3  # forward and two gradients of each


@pytest.mark.parametrize("mode", ["block", "dots"])
def test_gradients_are_the_same(interpreted, mode):
    plain, again = (jax.tree.leaves(f(*a)) for f, a in map(gradient, ("none", mode)))
    for a, b in zip(plain, again, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
