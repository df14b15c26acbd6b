# SPDX-License-Identifier: Apache-2.0
"""The palette codec: colors that stay apart, label maps that come back, probabilities of classes."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from digseg_jax.errors import UserError
from digseg_jax.segmentation import palette as lib
from digseg_jax.segmentation.ensemble import probabilities
from digseg_jax.segmentation.palette import Palette, build_palette, decode_palette, encode_palette


def blur(noise=0.05):
    """A stand-in for an autoencoder: colors shift a little and scatter."""

    def round_trip(image):
        rng = np.random.default_rng(0)
        return 0.9 * image + 0.05 + noise * rng.normal(size=image.shape).astype(np.float32)

    return round_trip


def identity(image):
    """Latents in which colors are as far apart as in images."""
    return image


@pytest.mark.parametrize("n", [1, 2, 8, 17, 150, 216])
def test_colors_are_distinct_and_label_maps_come_back(n):
    made = build_palette(n, blur(), identity)
    assert len({tuple(c) for c in made.colors.tolist()}) == n
    label = np.random.default_rng(1).integers(0, n, (2, 9, 7))
    image = np.asarray(encode_palette(label, made.colors))
    evidence = np.asarray(decode_palette(blur()(image), made.prototypes))
    assert evidence.shape == (2, n, 9, 7) and evidence.max() <= 0
    assert (evidence.argmax(1) == label).mean() > 0.99


def test_evidence_is_half_the_negative_squared_distance():
    rng = np.random.default_rng(0)
    image, prototypes = rng.uniform(-1, 1, (3, 4, 5, 3)), rng.uniform(-1, 1, (6, 3))
    expected = -0.5 * np.square(image[:, None] - prototypes[:, None, None]).sum(-1)
    np.testing.assert_allclose(decode_palette(image, prototypes), expected, atol=1e-5)


def test_probabilities_are_the_softmax_over_two_sigma_squared():
    made = Palette(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), 0.5)
    image = np.random.default_rng(0).uniform(-1, 1, (1, 2, 2, 3))
    evidence = np.asarray(decode_palette(image, made.prototypes))[:, :, None]
    got = np.asarray(probabilities(evidence, made.scale, np.zeros(3), exclusive=True))
    weight = np.exp(-np.square(image[:, None] - np.eye(3)[:, None, None]).sum(-1) / (2 * 0.5**2))
    np.testing.assert_allclose(got, weight / weight.sum(1, keepdims=True), atol=1e-5)


def test_sigma_is_the_scatter_of_the_round_trip():
    # the shift of the colors is in the prototypes, the noise is not
    assert build_palette(8, blur(0.2), identity).sigma == pytest.approx(0.2, rel=0.05)


def test_colors_that_the_autoencoder_cannot_hold_are_avoided():
    def no_blue(image):
        out = np.array(image)
        out[..., 2] = 0.0
        return out

    made = build_palette(8, no_blue, identity)
    pairs = np.linalg.norm(made.prototypes[:, None] - made.prototypes[None], axis=-1)
    assert pairs[~np.eye(8, dtype=bool)].min() > 0.5


def test_colors_that_latents_hardly_tell_apart_are_avoided():
    def faint_blue(image):
        return image * np.array([1.0, 1.0, 0.02], np.float32)

    made = build_palette(8, blur(0.001), faint_blue)
    pairs = np.linalg.norm((made.colors[:, None] - made.colors[None])[..., :2], axis=-1)
    assert pairs[~np.eye(8, dtype=bool)].min() > 0.5  # apart in red and green alone


def test_few_classes_are_far_apart():
    made = build_palette(8, blur(), identity)
    pairs = np.linalg.norm(made.colors[:, None] - made.colors[None], axis=-1)
    assert pairs[~np.eye(8, dtype=bool)].min() > 1.5  # the cube's corners would have 2


def test_ignored_pixels_are_gray():
    image = np.asarray(encode_palette(np.array([[[-1, 0]]]), np.ones((1, 3))))
    np.testing.assert_array_equal(image[0, 0], [[0, 0, 0], [1, 1, 1]])


@pytest.mark.parametrize("n", [0, 217, 847])
def test_too_many_classes_are_refused(n):
    with pytest.raises(UserError) as caught:
        build_palette(n, blur(), identity)
    assert "legal 1 to 216" in tiny.one_line(caught.value)


def test_a_palette_survives_its_file():
    made = build_palette(5, blur(), identity)
    again = Palette.from_dict(made.to_dict())
    np.testing.assert_array_equal(again.colors, made.colors)
    np.testing.assert_array_equal(again.prototypes, made.prototypes)
    assert again.sigma == made.sigma


def test_made_up_maps_have_regions_and_are_the_same_every_time():
    maps = lib.synthetic_maps(4, 6)
    assert maps.shape == (4, 64, 64) and set(np.unique(maps)) <= set(range(6))
    assert (maps[:, 1:] == maps[:, :-1]).mean() > 0.9
    np.testing.assert_array_equal(maps, lib.synthetic_maps(4, 6))
