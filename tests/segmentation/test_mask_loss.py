# SPDX-License-Identifier: Apache-2.0
"""The auxiliary loss: what a latent says about its mask, and what a wrong mask costs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from digseg_jax.segmentation.mask_loss import (
    MARGIN,
    MAX_WEIGHT,
    SHARPNESS,
    balanced_bce_and_dice,
    balanced_ce_and_dice,
    cell_shares,
    class_shares,
    latent_evidence,
    palette_logits,
)

FACTOR = 4


def linear_encoder(images):
    """Cell means of the channels, turned and shifted: a stand-in whose answers are known."""
    n, h, w, _ = images.shape
    cells = images.reshape(n, h // FACTOR, FACTOR, w // FACTOR, FACTOR, 3).mean((2, 4))
    turn = np.array([[1.0, -0.5, 0.2, 0.1], [0.3, 0.4, -0.9, 0.0], [0.0, 0.7, 0.1, -0.4]])
    return cells @ turn + np.array([0.5, -1.0, 0.0, 2.0])


def masks(seed: int = 0) -> np.ndarray:
    mask = np.where(np.random.default_rng(seed).random((3, 16, 16)) < 0.4, 1.0, -1.0)
    return np.repeat(mask[..., None], 3, axis=-1)


def test_shares_are_the_foreground_pixels_of_each_cell():
    mask = masks()
    share = np.asarray(cell_shares(jnp.asarray(mask), FACTOR))
    for n, i, j in np.ndindex(share.shape):
        cell = mask[n, i * FACTOR : (i + 1) * FACTOR, j * FACTOR : (j + 1) * FACTOR, 0]
        assert share[n, i, j] == pytest.approx((cell > 0).mean())


def test_latents_of_a_linear_encoder_give_back_the_shares():
    mask = jnp.asarray(masks())
    ends = linear_encoder(np.stack([np.full((16, 16, 3), end) for end in (-1.0, 1.0)]))
    evidence = latent_evidence(linear_encoder(mask), ends)
    np.testing.assert_allclose(evidence, 2 * cell_shares(mask, FACTOR) - 1, atol=1e-5)


def oracle(evidence, share, valid):
    """The same two terms in plain loops over the cells."""
    y, p = share[valid], 1 / (1 + np.exp(-SHARPNESS * evidence[valid]))
    ratio = np.clip((len(y) - y.sum()) / y.sum(), 1, MAX_WEIGHT) if y.sum() > 0 else 1.0
    error = -(ratio * y * np.log(p) + (1 - y) * np.log(1 - p)).sum()
    bce = error / (ratio * y + 1 - y).sum()
    return bce + 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)


@pytest.mark.parametrize("foreground", [0.0, 0.02, 0.5, 1.0])
def test_balanced_cross_entropy_and_dice_against_plain_loops(foreground):
    rng = np.random.default_rng(1)
    evidence = rng.uniform(-1, 1, (2, 6, 6)).astype(np.float32)
    share = (rng.random((2, 6, 6)) < foreground).astype(np.float32)
    valid = rng.random((2, 6, 6)) < 0.8
    ours = balanced_bce_and_dice(jnp.asarray(evidence), jnp.asarray(share), jnp.asarray(valid))
    theirs = [oracle(*row) for row in zip(evidence, share, valid, strict=True)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_an_empty_answer_to_a_small_object_costs_more_than_the_right_one():
    share = jnp.zeros((1, 8, 8)).at[0, 3, 3].set(1.0)
    valid = jnp.ones((1, 8, 8), bool)
    empty = balanced_bce_and_dice(-jnp.ones((1, 8, 8)), share, valid)
    right = balanced_bce_and_dice(2 * share - 1, share, valid)
    assert float(empty[0]) > 2 * float(right[0])


def test_cells_without_a_label_neither_cost_nor_pull():
    evidence, share = jnp.full((1, 4, 4), 0.3), jnp.ones((1, 4, 4))
    nothing = jnp.zeros((1, 4, 4), bool)
    pull = jax.grad(lambda e: balanced_bce_and_dice(e, share, nothing).sum())(evidence)
    assert np.isfinite(np.asarray(pull)).all() and not np.asarray(pull).any()


COLORS = np.array([[0.0, 0, 0, 0], [2, 0, 0, 0], [0, 3, 0, 0], [0, 0, 0, -9]], np.float32)


def test_a_palettes_logits_are_distances_and_its_closest_pair_is_told_apart_by_the_margin():
    latent = np.random.default_rng(0).normal(size=(2, 3, 3, 4)).astype(np.float32)
    logits = np.asarray(palette_logits(jnp.asarray(latent), jnp.asarray(COLORS)))
    distance = np.square(latent[..., None, :] - COLORS).sum(-1)
    expected = -MARGIN * (distance - distance[..., :1]) / 4.0
    np.testing.assert_allclose(logits - logits[..., :1], expected, atol=1e-4)
    own = np.asarray(palette_logits(jnp.asarray(COLORS)[None, None], jnp.asarray(COLORS)))[0, 0]
    assert own[0, 0] - own[0, 1] == pytest.approx(MARGIN)
    assert (own.argmax(-1) == np.arange(4)).all()


def test_one_color_alone_is_sure_of_itself():
    logits = palette_logits(jnp.zeros((1, 2, 2, 4)), jnp.asarray(COLORS[1:2]))
    assert np.isfinite(np.asarray(logits)).all()


def test_class_shares_leave_ignored_pixels_out():
    label = np.random.default_rng(0).integers(-1, 4, (2, 8, 8))
    share = np.asarray(class_shares(jnp.asarray(label), FACTOR, 4))
    for n, i, j, k in np.ndindex(share.shape):
        cell = label[n, i * FACTOR : (i + 1) * FACTOR, j * FACTOR : (j + 1) * FACTOR]
        assert share[n, i, j, k] == pytest.approx((cell == k).mean())


def classes_oracle(logits, share, valid):
    """Weighted cross-entropy and mean Dice in plain loops over the classes."""
    share, p = share[valid], np.exp(logits[valid])
    p /= p.sum(-1, keepdims=True)
    up = down = 0.0
    dice = []
    for k, cells in enumerate(share.sum(0)):
        weight = np.sqrt(np.clip(share.sum() / cells, 1, MAX_WEIGHT**2)) if cells else 0.0
        up -= weight * (share[:, k] * np.log(p[:, k])).sum()
        down += weight * cells
        if cells:
            both = (share[:, k] * p[:, k]).sum()
            dice.append(1 - (2 * both + 1) / (p[:, k].sum() + cells + 1))
    return up / down + np.mean(dice)


def test_cross_entropy_over_classes_and_dice_against_plain_loops():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(2, 6, 6, 5)).astype(np.float32)
    share = np.eye(5, dtype=np.float32)[rng.choice(4, p=[0.7, 0.2, 0.08, 0.02], size=(2, 6, 6))]
    valid = rng.random((2, 6, 6)) < 0.8
    ours = balanced_ce_and_dice(jnp.asarray(logits), jnp.asarray(share), jnp.asarray(valid))
    theirs = [classes_oracle(*row) for row in zip(logits, share, valid, strict=True)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_label_maps_without_a_label_neither_cost_nor_pull():
    share, nothing = jnp.zeros((1, 4, 4, 3)), jnp.zeros((1, 4, 4), bool)
    cost, pull = jax.value_and_grad(lambda x: balanced_ce_and_dice(x, share, nothing).sum())(
        jnp.ones((1, 4, 4, 3))
    )
    assert float(cost) == 0 and not np.asarray(pull).any()
