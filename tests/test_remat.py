# SPDX-License-Identifier: Apache-2.0
"""What a rematerialised block keeps beside its input."""

from __future__ import annotations

import collections
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend import core
from jax.interpreters import partial_eval

from digseg_jax import sharding
from digseg_jax.models import attention_kernels, feed_forward_kernel, functional
from digseg_jax.models.attention import Transformer2DModel
from digseg_jax.models.layers import Compute
from digseg_jax.sharding import LocalAttention, local_feed_forward

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


def calls(jaxpr: core.Jaxpr, found: collections.Counter) -> collections.Counter:
    """How often each kernel is called."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            told = str({k: v for k, v in equation.params.items() if k != "jaxpr"})
            found.update(kernel for kernel in KERNELS if kernel in told)
        else:
            for inner in jax.tree.leaves(
                list(equation.params.values()),
                is_leaf=lambda value: isinstance(value, core.Jaxpr | core.ClosedJaxpr),
            ):
                if isinstance(inner, core.ClosedJaxpr):
                    calls(inner.jaxpr, found)
                elif isinstance(inner, core.Jaxpr):
                    calls(inner, found)
    return found


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(sharding, "fused", partial(feed_forward_kernel.fused, interpret=True))


@pytest.mark.parametrize("mode", ["none", "block", "large"])
def test_no_kernel_of_the_forward_pass_runs_twice(interpreted, mode):
    function, arguments = gradient(mode)
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]  # as XLA does
    found = calls(used, collections.Counter())
    assert found == dict.fromkeys(KERNELS, 1)


def test_gradients_are_the_same(interpreted):
    plain, again = (jax.tree.leaves(f(*a)) for f, a in map(gradient, ("none", "block")))
    for a, b in zip(plain, again, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
