# SPDX-License-Identifier: Apache-2.0
"""Gradients of every parameter against torch: live where it is installed, else stored digests."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from gradient_cases import (
    CONFIGS,
    ZERO_GRADIENT,
    build_torch,
    digest,
    our_gradients,
    torch_gradients,
)
from oracle import GOLDEN, fill_torch, seeded_component

LIMIT = 1e-4  # relative L2, of each parameter's gradient
families = pytest.mark.parametrize("name", list(CONFIGS))


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    @functools.cache
    def gradients(name: str) -> dict[str, np.ndarray]:
        return our_gradients(name, seeded_component(CONFIGS[name], tmp_path_factory.mktemp(name)))

    return gradients


def total_norm(gradients: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in gradients.values())))


@families
def test_gradients_have_the_stored_digests(ours, name):
    golden = np.load(GOLDEN / "gradients.npz")
    expected = {
        key.partition("/")[2]: value
        for key, value in zip(golden["keys"].tolist(), golden["values"], strict=True)
        if key.startswith(f"{name}/")
    }
    got, scale = digest(ours(name)), total_norm(ours(name))
    assert got.keys() == expected.keys()
    for key, (norm, product) in expected.items():
        if key.endswith(ZERO_GRADIENT):
            assert got[key][0] <= 1e-6 * scale, key
        else:
            assert abs(got[key][0] - norm) <= LIMIT * norm, key
            # a product of n signs may grow by sqrt(n) over the norm
            width = np.sqrt(ours(name)[key].size)
            assert abs(got[key][1] - product) <= LIMIT * norm * width, key


@families
def test_gradients_live(ours, name):
    pytest.importorskip("torch")
    model = build_torch(name)
    fill_torch(model)
    expected = torch_gradients(name, model)
    got, scale = ours(name), total_norm(expected)
    assert got.keys() == expected.keys()
    for key, gradient in expected.items():
        error = np.linalg.norm(got[key].astype(np.float64) - gradient)
        if key.endswith(ZERO_GRADIENT):
            assert error <= 1e-6 * scale, key
        else:
            assert error <= LIMIT * np.linalg.norm(gradient), (key, error)
