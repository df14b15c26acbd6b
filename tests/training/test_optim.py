# SPDX-License-Identifier: Apache-2.0
"""Learning rate, optimizer and the moving average of the weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from digseg_jax.config.schema import OptimConfig
from digseg_jax.training.optim import learning_rate, make_optimizer, update_ema


def rates(steps=100, **options):
    rate = learning_rate(OptimConfig(**{"learning_rate": 1.0, "warmup_steps": 10} | options), steps)
    return np.array([float(rate(i)) for i in range(steps + 1)])


@pytest.mark.parametrize("schedule", ["cosine", "constant", "exponential"])
def test_it_warms_up_in_a_line_to_the_peak(schedule):
    got = rates(schedule=schedule)
    np.testing.assert_allclose(got[:11], np.arange(11) / 10, atol=1e-6)
    assert got.max() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("schedule", "end"), [("cosine", 0.01), ("exponential", 0.01), ("constant", 1.0)]
)
def test_it_ends_at_its_final_share(schedule, end):
    got = rates(schedule=schedule)
    assert got[-1] == pytest.approx(end, rel=1e-4)
    assert (np.diff(got[10:]) <= 1e-7).all()


def test_a_constant_rate_falls_in_a_line_at_the_end():
    got = rates(schedule="constant", cooldown_steps=20)
    assert (got[10:81] == 1).all()
    np.testing.assert_allclose(got[80:], np.linspace(1, 0.01, 21), rtol=1e-5)
    short = rates(schedule="constant", cooldown_steps=1000)
    assert short[10] == 1 and short[-1] == pytest.approx(0.01, rel=1e-4)


def test_halfway_down_the_cosine():
    assert rates()[55] == pytest.approx(0.01 + 0.99 / 2, abs=1e-5)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_a_run_shorter_than_the_warm_up_still_learns(steps):
    got = rates(steps=steps, warmup_steps=100)
    assert np.isfinite(got).all() and got.max() > 0


def test_without_warm_up_it_starts_at_the_peak():
    assert rates(warmup_steps=0)[0] == 1.0


def first_update(params, grads, **options):
    config = OptimConfig(**{"warmup_steps": 0, "learning_rate": 0.1} | options)
    optimizer = make_optimizer(config, 10)
    return optimizer.update(grads, optimizer.init(params), params)[0]


def test_only_kernels_decay():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(2)}
    zero = {k: jnp.zeros_like(v) for k, v in params.items()}
    update = first_update(params, zero, weight_decay=0.5)
    np.testing.assert_allclose(update["kernel"], -0.05, rtol=1e-5)
    np.testing.assert_array_equal(update["bias"], 0)
    np.testing.assert_array_equal(update["scale"], 0)


def test_a_learned_prompt_does_not_decay_though_it_is_a_table():
    params = {
        "attn2": {"prompt": {"embedding": jnp.ones((3, 2))}, "to_k": {"kernel": jnp.ones((2, 2))}}
    }
    zero = jax.tree.map(jnp.zeros_like, params)
    update = first_update(params, zero, weight_decay=0.5)["attn2"]
    np.testing.assert_array_equal(update["prompt"]["embedding"], 0)
    np.testing.assert_allclose(update["to_k"]["kernel"], -0.05, rtol=1e-5)


def test_a_gradient_of_any_size_moves_adam_by_the_learning_rate():
    params = {"kernel": jnp.zeros((2, 2))}
    for size in (1e-3, 1e3):
        update = first_update(params, {"kernel": jnp.full((2, 2), size)})
        np.testing.assert_allclose(update["kernel"], -0.1, rtol=1e-3)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3}, {"mu_dtype": "bfloat16"}])
def test_new_parameters_alone_learn_at_their_own_rate(options):
    """Ten times the step, weight decay included; the state does not know of it."""
    names = ("text_adapters", "attn2")
    params = {name: {"to_k": {"kernel": jnp.ones((2, 2))}} for name in names}
    grads = {name: {"to_k": {"kernel": jnp.full((2, 2), 0.1)}} for name in names}
    updates, states = {}, {}
    for scale in (1.0, 10.0):
        config = OptimConfig(warmup_steps=0, learning_rate=0.1, new_lr_scale=scale, **options)
        optimizer = make_optimizer(config, 10, (r"^text_adapters\.",))
        updates[scale], states[scale] = optimizer.update(grads, optimizer.init(params), params)
    old, new = ([updates[s][n]["to_k"]["kernel"] for s in (1.0, 10.0)] for n in reversed(names))
    np.testing.assert_array_equal(old[0], old[1])
    np.testing.assert_allclose(new[1], 10 * new[0], rtol=1e-6)
    assert np.any(new[0]) and jax.tree.structure(states[1.0]) == jax.tree.structure(states[10.0])
    plain = make_optimizer(OptimConfig(**options), 10).init(params)
    assert jax.tree.structure(plain) == jax.tree.structure(states[10.0])


def test_large_gradients_are_clipped_by_their_common_norm():
    """After a normal step a spike moves no more than a clipped one does."""
    params = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    optimizer = make_optimizer(OptimConfig(warmup_steps=0, clip_norm=1.0), 10)

    def second(spike):
        state = optimizer.init(params)
        _, state = optimizer.update({"a": jnp.array(0.6), "b": jnp.array(0.8)}, state, params)
        grads = {"a": jnp.array(3 * spike), "b": jnp.array(4 * spike)}
        return optimizer.update(grads, state, params)[0]

    small, large = second(0.2), second(2e5)  # of norms 1 and a million
    np.testing.assert_allclose(small["a"], large["a"], rtol=1e-5)
    np.testing.assert_allclose(small["b"], large["b"], rtol=1e-5)


def test_the_average_follows_the_weights_and_forgets_the_start():
    ema, params = {"w": jnp.array(100.0)}, {"w": jnp.array(1.0)}
    for step in range(200):
        ema = update_ema(ema, params, jnp.asarray(step), 0.99)
    # with a constant decay of 0.99 it would still be 14 above
    assert float(ema["w"]) == pytest.approx(1.0, abs=1e-3)


def test_late_in_training_the_average_has_the_stated_decay():
    got = update_ema({"w": jnp.array(0.0)}, {"w": jnp.array(1.0)}, jnp.asarray(10**6), 0.99)
    assert float(got["w"]) == pytest.approx(0.01, rel=1e-4)


def test_training_with_it_reaches_a_minimum():
    params = {"w": jnp.array([3.0, -2.0])}
    optimizer = make_optimizer(OptimConfig(learning_rate=0.3, warmup_steps=5), 100)
    state = optimizer.init(params)
    for _ in range(100):
        updates, state = optimizer.update({"w": 2 * params["w"]}, state, params)
        params = optax.apply_updates(params, updates)
    assert float(jnp.abs(params["w"]).max()) < 0.05
