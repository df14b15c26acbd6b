# SPDX-License-Identifier: Apache-2.0
"""A batch that the devices do not divide is told before any weights are loaded."""

from __future__ import annotations

import pytest
import tiny

from digseg_jax import jobs
from digseg_jax.errors import UserError
from digseg_jax.training.mesh_choice import choose_mesh
from digseg_jax.training.setup import check_batch_size

NOWHERE = {"vae": "/nowhere/vae", "unet": "/nowhere/unet", "text": "/nowhere/text"}


def check(config) -> None:
    check_batch_size(config.train.batch_size, config.compute, config.mesh)


def refused(**changes) -> str:
    with pytest.raises(UserError) as caught:
        check(tiny.config(NOWHERE, **changes))
    return tiny.one_line(caught.value)


@pytest.mark.parametrize(
    "mesh", [{}, {"mesh__fsdp": 0}, {"mesh__fsdp": 8}, {"mesh__data": 2, "mesh__fsdp": 0}]
)
def test_eight_devices_split_a_batch_whatever_fsdp_will_be(mesh):
    assert "config.train.batch_size=12: must be a multiple of 8" in refused(
        train__batch_size=12, **mesh
    )
    check(tiny.config(NOWHERE, train__batch_size=16, **mesh))


def test_microbatches_and_the_tensor_axis_count():
    message = refused(train__batch_size=16, compute__accumulation=4)
    assert "multiple of 32" in message and "config.compute.accumulation=" in message
    check(tiny.config(NOWHERE, train__batch_size=16, compute__accumulation=0))
    check(tiny.config(NOWHERE, train__batch_size=4, mesh__tensor=2))


def test_a_training_tells_it_first(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "check_training_data", lambda data: None)
    monkeypatch.setattr(jobs, "check_scored_splits", lambda *splits, **options: None)
    with pytest.raises(UserError, match="batch_size=12: must be a multiple of 8"):
        jobs.train(tiny.config(NOWHERE, train__batch_size=12), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"mesh__tensor": 0}, {"mesh__tensor": 0, "mesh__fsdp": 0}])
def test_an_axis_without_a_size_is_told(changes):
    assert "tensor=0: does not fit 8 devices" in refused(**changes)
    config = tiny.config(NOWHERE, **changes)
    assert choose_mesh(config.mesh, lambda parts: 1 / 0, []) == config.mesh  # nothing is asked for
