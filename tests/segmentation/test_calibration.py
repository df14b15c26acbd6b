# SPDX-License-Identifier: Apache-2.0
"""Fitting the scale and the biases that turn decoded masks into probabilities."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import jaccard_score

from digseg_jax.errors import UserError
from digseg_jax.segmentation import calibration
from digseg_jax.segmentation.calibration import fit, identity, stored_scale

N = 4


def pixels(n=4000, seed=0, offset=(0.0, 0.0, 0.0, 0.0), noise=0.5, rates=None):
    """Evidence around +-0.5 for true classes, with a per-class offset that a bias can undo."""
    rng = np.random.default_rng(seed)
    label = rng.choice(N, n, p=rates)
    evidence = np.where(np.eye(N)[label] > 0, 0.5, -0.5) + noise * rng.standard_normal((n, N))
    return np.clip(evidence + np.asarray(offset), -1, 1), label


def miou(fitted, evidence, label):
    return calibration._argmax_miou((fitted.scale * evidence + np.asarray(fitted.bias)).T, label)


def test_identity_is_scale_two_without_bias():
    assert identity(3).to_dict() == {"scale": 2.0, "bias": [0.0, 0.0, 0.0], "split": "none"}


def test_a_bias_undoes_a_class_that_claims_too_much():
    evidence, label = pixels(offset=(0.4, 0.0, 0.0, -0.3))
    fitted = fit(evidence, label, "val")
    assert fitted.bias[0] < fitted.bias[3] and fitted.split == "val"
    assert miou(fitted, evidence, label) > miou(identity(N), evidence, label) + 0.02


@pytest.mark.parametrize("seed", range(3))
def test_the_fit_is_never_worse_on_its_own_pixels(seed):
    evidence, label = pixels(seed=seed, rates=[0.7, 0.2, 0.08, 0.02], noise=0.8)
    fitted = fit(evidence, label, "val")
    unbiased = calibration.Calibration(fitted.scale, (0.0,) * N, "val")
    assert miou(fitted, evidence, label) >= miou(unbiased, evidence, label)


def test_it_carries_over_to_pixels_it_has_not_seen():
    offset = (0.4, 0.0, 0.0, -0.3)
    fitted = fit(*pixels(offset=offset), "val")
    other = pixels(seed=9, offset=offset)
    assert miou(fitted, *other) > miou(identity(N), *other)


def test_sharp_evidence_gets_a_larger_scale_than_vague_evidence():
    sharp, vague = fit(*pixels(noise=0.1), "val"), fit(*pixels(noise=2.0), "val")
    assert sharp.scale > vague.scale
    assert {sharp.scale, vague.scale} <= set(calibration.SCALES)


def test_perfect_evidence_needs_no_bias():
    evidence, label = pixels(noise=0.0)
    assert fit(evidence, label, "val").bias == (0.0,) * N


def test_ignored_pixels_do_not_count():
    evidence, label = pixels(500)
    wild = np.concatenate([evidence, np.full((300, N), 0.9)])
    assert fit(wild, np.concatenate([label, np.full(300, -1)]), "val") == fit(evidence, label, "val")


def test_biases_stay_within_bounds_and_in_json():
    evidence, label = pixels(offset=(1.5, -1.5, 1.5, -1.5))
    fitted = fit(evidence, label, "val")
    assert max(map(abs, fitted.bias)) <= calibration.MAX_BIAS
    assert json.loads(json.dumps(fitted.to_dict())) == fitted.to_dict()


def test_a_class_that_does_not_occur_does_not_break_the_fit():
    evidence, label = pixels(rates=[0.5, 0.5, 0.0, 0.0])
    assert np.isfinite(fit(evidence, label, "val").bias).all()


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("scale", [None, 2.0])
def test_equal_members_are_fitted_like_one(scale, exclusive):
    evidence, label = pixels(offset=(0.4, 0.0, 0.0, -0.3))
    members = np.repeat(evidence[..., None], 3, axis=2)
    fits = [fit(each, label, "val", scale, exclusive=exclusive) for each in (members, evidence)]
    assert fits[0] == fits[1]


def test_a_known_scale_says_nothing_about_how_classes_share_a_pixel():
    """With members that disagree, the mean of softmaxes has other best biases than that of sigmoids."""
    parts = [pixels(noise=0.9, offset=(0.6 * sign, 0, 0, 0)) for sign in (-1, 1)]
    members, label = np.stack([evidence for evidence, _ in parts], axis=2), parts[0][1]
    apart, shared = (fit(members, label, "val", 4.0, exclusive=x) for x in (False, True))
    assert apart.scale == shared.scale == 4.0 and apart.bias != shared.bias

    logits = 4.0 * members + np.asarray(shared.bias)[:, None]
    weights = np.exp(logits)
    means = (weights / weights.sum(axis=1, keepdims=True)).mean(axis=2)
    best = calibration._argmax_miou(means.T, label)
    assert best >= calibration._argmax_miou((np.exp(4.0 * members)).mean(axis=2).T, label)


def test_the_scale_of_exclusive_classes_is_that_of_their_softmax():
    evidence, label = pixels(noise=0.3)
    fitted = fit(evidence, label, "val", exclusive=True)

    def cross_entropy(scale):
        logits = scale * evidence
        return (np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(label)), label]).mean()

    assert fitted.scale == min(calibration.SCALES, key=cross_entropy)


def test_biases_are_fitted_to_the_mean_of_the_members_probabilities():
    """As an evaluation combines them; the mean of their evidence is another thing."""
    parts = [pixels(noise=0.9, seed=0, offset=(0.6 * sign, 0, 0, 0)) for sign in (-1, 1)]
    label = parts[0][1]
    members = np.stack([evidence for evidence, _ in parts], axis=2)

    def score(fitted):
        logits = fitted.scale * members + np.asarray(fitted.bias)[:, None]
        return calibration._argmax_miou((1 / (1 + np.exp(-logits))).mean(axis=2).T, label)

    both, mean = fit(members, label, "val"), fit(members.mean(axis=2), label, "val")
    assert score(both) >= score(identity(N, both.scale))
    assert score(both) > score(calibration.Calibration(both.scale, mean.bias, "val"))


@pytest.mark.parametrize(("softmax", "background"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("inner", [(), ((), (2,), (), ())])
@pytest.mark.parametrize("members", [1, 3])
def test_a_bias_tried_alone_gives_the_values_of_all(softmax, background, members, inner):
    rng = np.random.default_rng(0)
    logits, bias = rng.normal(size=(N, 50, members)), rng.normal(size=N)
    other = bias + np.eye(N)[2]
    kind = calibration._Kind(softmax, background, inner)
    before = calibration._values(logits, bias, kind)
    after = calibration._rebiased(before, logits, other, 2, kind)
    np.testing.assert_array_equal(after, calibration._values(logits, other, kind))
    assert not np.array_equal(before, after)


@pytest.mark.parametrize("scale", [0.0, -2.0, 1e30])
def test_a_scale_that_no_fit_gives_is_refused(tmp_path, scale):
    """Masks would be black, or inverted."""
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"scale": scale}))
    with pytest.raises(UserError, match="calibration.json: scale=.* must be above 0 and at most 100"):
        stored_scale(path)
    path.write_text(json.dumps({"scale": 3}))
    assert stored_scale(path) == 3.0


def test_a_class_that_covers_another_is_fitted_as_it_is_scored():
    """Disc and cup of a retina: the disc's mask covers the cup, which is subtracted in evaluations."""
    rng = np.random.default_rng(0)
    label = rng.choice(3, 6000, p=(0.7, 0.2, 0.1))
    covers = ((0,), (1, 2), (2,))
    masks = np.stack([np.isin(label, covered) for covered in covers], axis=-1)
    evidence = np.clip(np.where(masks, 0.4, -0.4) + 0.35 * rng.standard_normal((6000, 3)), -1, 1)

    def scored(fitted):
        logits = fitted.scale * evidence + np.asarray(fitted.bias)
        disc, cup = (1 / (1 + np.exp(-logits[:, c])) for c in (1, 2))
        background = 1 / (1 + np.exp(-logits[:, 0]))
        found = np.stack([background, np.minimum(disc, 1 - cup), cup]).argmax(axis=0)
        return jaccard_score(label, found, average="macro")

    nested, plain = fit(evidence, label, "val", covers=covers), fit(evidence, label, "val")
    assert scored(nested) >= scored(identity(3, nested.scale)) - 1e-9
    assert scored(nested) > scored(plain) + 0.02
    own = tuple((c,) for c in range(3))
    assert fit(evidence, label, "val", covers=own) == plain
