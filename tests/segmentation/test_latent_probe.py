# SPDX-License-Identifier: Apache-2.0
"""The linear probe: finds the direction of the mask in the latents, and says how well."""

from __future__ import annotations

import numpy as np
import pytest

from digseg_jax.segmentation.latent_probe import LatentProbe, enlarge, fit_probe


def encoder(noise):
    """Latents whose second channel is the coverage of an 8 x 8 cell, scaled and shifted."""

    def encode(image):
        n, h, w, _ = image.shape
        coverage = image[..., 0].reshape(n, h // 8, 8, w // 8, 8).mean(axis=(2, 4))
        latent = np.random.default_rng(0).normal(size=(*coverage.shape, 4))
        latent[..., 1] = 3 * coverage + 0.5 + noise * latent[..., 1]
        return latent

    return encode


def test_it_finds_the_direction():
    probe = fit_probe(encoder(0.0))
    np.testing.assert_allclose(probe.weight, [0, 1 / 3, 0, 0], atol=1e-5)
    assert probe.offset == pytest.approx(-0.5 / 3, abs=1e-5) and probe.r2 == pytest.approx(1)


def test_it_says_how_much_it_explains():
    assert 0.3 < fit_probe(encoder(3.0)).r2 < 0.9


def test_evidence_is_clipped_like_a_decoded_mask():
    probe = LatentProbe(np.array([1.0, 0.0]), 0.25, 1.0)
    latent = np.array([[[0.5, 9.0], [3.0, 0.0], [-3.0, 0.0]]])
    np.testing.assert_allclose(np.asarray(probe(latent)), [[0.75, 1.0, -1.0]])


def test_cells_become_pixels():
    got = np.asarray(enlarge(np.full((2, 3, 4, 4), 0.5), 32, 32))
    assert got.shape == (2, 3, 32, 32)
    np.testing.assert_allclose(got, 0.5)
