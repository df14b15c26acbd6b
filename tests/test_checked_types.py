# SPDX-License-Identifier: Apache-2.0
"""The checker of annotations is at work in the rooms of `conftest`, and refuses what is wrong."""

from __future__ import annotations

import jaxtyping
import numpy as np
import pytest

from digseg_jax.metrics.boundary import band_width, boundary_counts
from digseg_jax.models.unet import UNetConfig

SQUARE, OBLONG = np.zeros((4, 4), int), np.zeros((3, 4), int)


def test_an_array_of_another_shape_is_refused_at_the_call():
    with pytest.raises(jaxtyping.TypeCheckError, match="boundary_counts"):
        boundary_counts(SQUARE, OBLONG, 2)


def test_a_result_of_another_shape_is_refused(monkeypatch):
    monkeypatch.setattr("digseg_jax.metrics.boundary.np.zeros", lambda *_: np.ones((2, 3), int))
    with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
        boundary_counts(SQUARE - 1, SQUARE - 1, 2)


def test_a_string_is_no_number_but_an_int_is_a_float():
    assert band_width(100, 100, 1) == 141
    with pytest.raises(jaxtyping.TypeCheckError, match="ratio"):
        band_width(100, 100, "0.02")


def test_methods_that_return_their_own_class_work():
    assert UNetConfig.from_dict({"in_channels": 8}).in_channels == 8


@pytest.mark.usefixtures("unchecked")
def test_a_test_may_pass_what_annotations_forbid():
    with pytest.raises(ValueError, match="differ in shape"):
        boundary_counts(SQUARE, OBLONG, 2)
