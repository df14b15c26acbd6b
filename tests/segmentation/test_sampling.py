# SPDX-License-Identifier: Apache-2.0
"""E-Step inference: members, queries and images keep their places, and noise its meaning."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import one_line

from digseg_jax.config.sampling import EStep
from digseg_jax.diffusion.schedule import make_schedule
from digseg_jax.errors import UserError
from digseg_jax.segmentation import ensemble, sampling

# predicting x0 itself, so that what a fake network returns is what comes out
SCHEDULE = make_schedule(1000, 0.00085, 0.012, zero_snr=True, prediction_type="sample")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8x2", EStep(8, 2)),
        ("1x1:trailing", EStep(1, 1)),
        ("20x50:leading", EStep(20, 50, "leading")),
    ],
)
def test_an_estep_is_read_and_written(text, expected):
    assert EStep.parse(text) == expected
    assert EStep.parse(str(expected)) == expected


@pytest.mark.parametrize("text", ["", "8", "8x", "x2", "8x2x1", "0x2", "8x0", "-1x2", "8x2:even",
                                  "8 x 2", "8X2", "8x2:", "8x2\n", "1.5x2"])  # fmt: skip
def test_anything_else_is_refused_with_an_example(text):
    with pytest.raises(UserError) as caught:
        EStep.parse(text)
    assert "ExS" in one_line(caught.value) and "8x2" in str(caught.value)


class TestMemberNoise:
    """A pure function of seed, image and member."""

    def noise(self, index, ensemble=3, seed=0):
        return np.asarray(sampling.member_noise(seed, jnp.asarray(index), ensemble, (4, 4, 2)))

    def test_shape_and_distribution(self):
        noise = self.noise(np.arange(50))
        assert noise.shape == (50, 3, 4, 4, 2)
        assert noise.std() == pytest.approx(1, abs=0.03) and abs(noise.mean()) < 0.03

    def test_an_image_has_the_same_noise_in_any_company(self):
        alone, together = self.noise([7]), self.noise([3, 7, 9])
        np.testing.assert_array_equal(alone[0], together[1])

    def test_a_larger_ensemble_begins_with_the_smaller_one(self):
        np.testing.assert_array_equal(self.noise([5], 2), self.noise([5], 6)[:, :2])

    def test_seed_image_and_member_each_matter(self):
        base = self.noise([1, 2])
        assert (base[0] != base[1]).all() and (base[:, 0] != base[:, 1]).all()
        assert (self.noise([1, 2], seed=1) != base).all()


def run(predict, n=2, q=3, e=4, estep=None):
    """Image i holds i, query j's tokens hold j, member k's noise holds k, everywhere."""
    image = jnp.arange(n, dtype=jnp.float32)[:, None, None, None] * jnp.ones((n, 2, 2, 1))
    tokens = jnp.arange(q, dtype=jnp.float32)[:, None, None] * jnp.ones((q, 5, 6))
    mask = jnp.arange(5)[None] <= jnp.arange(q)[:, None]
    noise = jnp.arange(e, dtype=jnp.float32)[None, :, None, None, None] * jnp.ones((n, e, 2, 2, 1))
    out = sampling.sample_mask_latents(
        predict, image, tokens, mask, noise, SCHEDULE, estep or EStep(e, 1)
    )
    return np.asarray(out)


def test_every_latent_lands_where_its_image_query_and_member_say():
    def predict(image, x, t, tokens, mask):
        query = tokens[:, :1, :1, None]
        return 100 * image + 10 * query + x

    out = run(predict)
    assert out.shape == (2, 3, 4, 2, 2, 1)
    for i, j, k in np.ndindex(2, 3, 4):
        np.testing.assert_array_equal(out[i, j, k], 100 * i + 10 * j + k)


def test_every_query_comes_with_its_own_text_mask():
    out = run(lambda image, x, t, tokens, mask: jnp.ones_like(x) * mask.sum(1)[:, None, None, None])
    for j in range(3):
        np.testing.assert_array_equal(out[:, j], j + 1)


def test_all_queries_of_an_image_start_from_the_same_noise():
    out = run(lambda image, x, t, tokens, mask: x)
    for j in range(3):
        np.testing.assert_array_equal(out[:, j], out[:, 0])


def test_the_network_is_called_once_a_step_for_all_of_them():
    batches = []

    def predict(image, x, t, tokens, mask):
        jax.debug.callback(lambda t: batches.append(np.asarray(t).tolist()), t, ordered=True)
        return x

    run(predict, estep=EStep(4, 2))
    jax.effects_barrier()
    assert batches == [[999] * 24, [499] * 24]


def test_probabilities_are_averaged_over_members_not_colors():
    evidence = jnp.array([1.0, -0.2]).reshape(1, 1, 2, 1, 1)
    got = float(ensemble.probabilities(evidence, 6.0, jnp.zeros(1))[0, 0, 0, 0])
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    assert got == pytest.approx((sigmoid(6.0) + sigmoid(-1.2)) / 2, rel=1e-5)
    assert abs(got - sigmoid(6.0 * 0.4)) > 0.2  # the mean color would say this


def test_scale_and_bias_belong_to_their_query():
    evidence = jnp.full((2, 3, 1, 2, 2), 0.5)
    got = np.asarray(ensemble.probabilities(evidence, 2.0, jnp.array([-1.0, 0.0, 3.0])))
    for j, bias in enumerate((-1.0, 0.0, 3.0)):
        np.testing.assert_allclose(got[:, j], 1 / (1 + np.exp(-(1.0 + bias))), rtol=1e-5)


class TestEnsembleRules:
    """Mean, median and vote, against numpy."""

    members = np.random.default_rng(0).random((2, 3, 5, 4, 4))

    def test_mean_and_median(self):
        for rule, function in (("mean", np.mean), ("median", np.median)):
            got = np.asarray(ensemble.combine(self.members, rule))
            np.testing.assert_allclose(got, function(self.members, axis=2), rtol=1e-6)

    def test_a_vote_on_single_queries_counts_members_above_one_half(self):
        got = np.asarray(ensemble.combine(self.members, "vote"))
        np.testing.assert_allclose(got, (self.members > 0.5).sum(2) / 5, rtol=1e-6)

    def test_a_vote_between_queries_counts_who_chose_it(self):
        got = np.asarray(ensemble.combine(self.members, "vote", exclusive=True))
        for n, y, x in np.ndindex(2, 4, 4):
            ballots = np.bincount(self.members[n, :, :, y, x].argmax(0), minlength=3)
            np.testing.assert_allclose(got[n, :, y, x], ballots / 5, rtol=1e-6)
        np.testing.assert_allclose(got.sum(1), 1, rtol=1e-6)

    def test_another_rule_is_refused(self):
        with pytest.raises(ValueError, match="legal: mean, median, vote"):
            ensemble.combine(self.members, "max")


def test_texts_of_each_image_stay_with_it():
    """Gated queries: every image has its own list."""
    image = jnp.zeros((2, 2, 2, 1))
    tokens = jnp.arange(6.0).reshape(2, 3, 1, 1) * jnp.ones((2, 3, 5, 6))
    mask = jnp.arange(5) <= jnp.arange(6).reshape(2, 3, 1)
    out = sampling.sample_mask_latents(
        lambda image, x, t, tokens, mask: (
            tokens[:, :1, :1, None] + 10 * mask.sum(1)[:, None, None, None] + 0 * x
        ),
        image, tokens, mask, jnp.zeros((2, 2, 2, 2, 1)), SCHEDULE, EStep(2, 1),
    )  # fmt: skip
    expected = np.arange(6).reshape(2, 3)
    expected = expected + 10 * np.minimum(expected + 1, 5)
    np.testing.assert_array_equal(
        np.asarray(out)[:, :, :, 0, 0, 0], np.repeat(expected[..., None], 2, 2)
    )


def test_a_key_and_its_number_draw_the_same_noise():
    index = jnp.arange(3)
    a = sampling.member_noise(7, index, 2, (4, 4, 2))
    b = sampling.member_noise(jax.random.key(7), index, 2, (4, 4, 2))
    np.testing.assert_array_equal(a, b)
