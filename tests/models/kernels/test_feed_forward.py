# SPDX-License-Identifier: Apache-2.0
"""The fused feed-forward kernel, interpreted, against the layers one by one."""

from __future__ import annotations

import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from digseg_jax.errors import UserError
from digseg_jax.models import functional, partition
from digseg_jax.models.feed_forward import FeedForward
from digseg_jax.models.kernels import feed_forward as kernel
from digseg_jax.models.layers import Compute
from digseg_jax.models.partition import local_feed_forward
from digseg_jax.runtime import sharding
from digseg_jax.runtime.sharding import BATCH, on_mesh
from digseg_jax.training.tasks.parts import unet_options

LIMIT = 1e-5
FEATURES = 96  # no multiple of a register's lanes, as the 320 of Stable Diffusion


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(partition, "fused", partial(kernel.fused, interpret=True))


def relative_l2(actual, expected) -> float:
    return float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected))


def layer(feed_forward=None, features=FEATURES, dtype=jnp.float32):
    """The module of equal weights, whichever way it computes; biases that are not zero."""
    compute = Compute(dtype=dtype, feed_forward=feed_forward)
    module = FeedForward(features, compute=compute, rngs=nnx.Rngs(0))
    graphdef, params = functional.split(module)
    shifted = jax.tree.map(lambda a: a + 0.1 * (a.ndim == 1), params)
    return partial(lambda graphdef, params, x: functional.merge(graphdef, params)(x), graphdef), shifted


def positions(batch=2, length=256, features=FEATURES):
    return jax.random.normal(jax.random.key(1), (batch, length, features))


def with_gradients(apply, params, x):
    """Output, and gradients of parameters and input for a cotangent that tells all of it apart."""
    weigh = jnp.cos(jnp.arange(x.size).reshape(x.shape))
    value, pullback = jax.vjp(lambda p, x: apply(p, x).astype(jnp.float32), params, x)
    return jax.tree.leaves((value, pullback(weigh)))


@pytest.mark.parametrize("features", [32, FEATURES, 320])
def test_fused_equals_its_layers_forward_and_backward(interpreted, features):
    x = positions(length=384, features=features)
    plain = with_gradients(*layer(features=features), x)
    fused = with_gradients(*layer(local_feed_forward, features), x)
    for a, b in zip(fused, plain, strict=True):
        assert relative_l2(a, b) <= LIMIT


def test_sixteen_bits_are_summed_in_float32(interpreted):
    """Not further from the exact result than the layers are, which round in between."""
    x = positions()
    exact = with_gradients(*layer(), x)
    plain = with_gradients(*layer(dtype=jnp.bfloat16), x)
    fused = with_gradients(*layer(local_feed_forward, dtype=jnp.bfloat16), x)
    for a, b, truth in zip(fused, plain, exact, strict=True):
        assert relative_l2(a, truth) <= 1.1 * relative_l2(b, truth) + 1e-3


@pytest.mark.parametrize("axes", [{"data": 4}, {"data": 2, "fsdp": 2}, {"data": 8}])
def test_the_gradients_of_all_devices_are_summed(interpreted, axes):
    """Also where the examples do not divide: 4 of them on 8 devices."""
    x = positions(batch=4, length=128)
    plain = with_gradients(*layer(), x)
    apply, params = layer(local_feed_forward)
    mesh = tiny.mesh(**axes)
    place = jax.sharding.NamedSharding(mesh, BATCH if len(mesh.devices.flat) <= 4 else sharding.P())
    step = jax.jit(on_mesh(mesh, lambda p, x: with_gradients(apply, p, x)))
    for a, b in zip(step(params, jax.device_put(x, place)), plain, strict=True):
        assert relative_l2(a, b) <= LIMIT


@pytest.mark.parametrize(
    ("length", "features", "taken"),
    [
        (4096, 320, True),
        (1024, 640, True),
        (576, 320, False),  # 24 x 24: no multiple of 128
        (256, 1280, False),  # more channels than positions
        (4096, 1280, False),  # more than the chip's memory holds
        (512, 20, False),  # hidden channels that no register is filled with
    ],
)
def test_the_maps_that_it_takes(length, features, taken):
    assert kernel.takes(length, features, 4 * features) == taken


@pytest.mark.usefixtures("unchecked")
def test_other_maps_go_through_the_layers():
    def never(*arrays):
        raise AssertionError("called")

    apply, params = layer(never)
    x = positions(length=FEATURES)
    np.testing.assert_array_equal(apply(params, x), layer()[0](params, x))
    with pytest.raises(ValueError, match="200 positions; legal: multiples of 128"):
        kernel.fused(jnp.zeros((200, 32)), *[jnp.zeros(1)] * 4)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("platform", "tensor", "expected"), [("tpu", 1, "fused"), ("tpu", 2, "plain"), ("cpu", 1, "plain")]
)
def test_auto_is_for_tpus_with_whole_weights(folders, platform, tensor, expected):
    config = tiny.config(folders, mesh__tensor=tensor)
    found = tiny.for_devices(config, [types.SimpleNamespace(platform=platform)])
    assert found.compute.feed_forward == expected
    asked = unet_options(found.model, found.compute)["feed_forward"]
    assert asked is (local_feed_forward if expected == "fused" else None)


def test_what_cannot_run_it_is_refused_by_name(folders):
    config = tiny.config(folders, compute__feed_forward="fused")
    with pytest.raises(UserError, match="feed_forward='fused' runs on TPUs only.*legal: auto, plain"):
        tiny.for_devices(config, jax.devices())
    with pytest.raises(UserError, match="feed_forward='fused' with config.mesh.tensor=2"):
        tiny.config(folders, compute__feed_forward="fused", mesh__tensor=2)
