# SPDX-License-Identifier: Apache-2.0
"""Losses of a mixture's parts, and their shares of the examples, as metrics.jsonl has them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from digseg_jax.training.tasks.shares import part_losses
from digseg_jax.training.train_log import with_part_losses

NAMES = ("streets", "cells", "land")


def logged(steps):
    """The line of metrics.jsonl of some steps: means, then losses by part."""
    rows = [{k: float(v) for k, v in part_losses(*step, NAMES).items()} for step in steps]
    return with_part_losses({k: float(np.mean([row[k] for row in rows])) for k in rows[0]})


def test_a_parts_loss_is_the_mean_over_its_images_of_all_steps():
    rng = np.random.default_rng(0)
    squared, valid = rng.random((2, 4, 6)), rng.random((2, 4, 6)) > 0.3
    part = np.array([[0, 1, 0, 0], [1, 1, 0, 1]])
    found = logged([tuple(map(jnp.asarray, step)) for step in zip(squared, valid, part, strict=True)])
    each = (squared * valid).sum(-1) / valid.sum(-1)
    for k, name in enumerate(NAMES[:2]):
        assert found[f"loss/{name}"] == pytest.approx(each[part == k].mean(), rel=1e-5)
        assert found[f"share/{name}"] == pytest.approx((part == k).mean())
    assert found["share/land"] == 0 and "loss/land" not in found
    assert not any(key.startswith("part_loss") for key in found)


def test_an_image_without_labels_has_no_loss():
    found = logged([(jnp.ones((2, 3)), jnp.asarray([[True] * 3, [False] * 3]), jnp.asarray([0, 1]))])
    assert found["loss/streets"] == 1.0 and found["loss/cells"] == 0.0
