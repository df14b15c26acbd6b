# SPDX-License-Identifier: Apache-2.0
"""The E-Step grid over seeds: what is counted, and what is refused."""

from __future__ import annotations

import pytest
import tiny
from tiny import one_line

from digseg_jax.errors import UserError
from digseg_jax.training.tasks.segmentation import SegmentationTask
from tests.bench import estep


def rows(**means):
    return [{"estep": key.removeprefix("_"), "mean": mean} for key, mean in means.items()]


def test_monotone_compares_rows_of_the_same_steps_alone():
    assert estep.monotone(rows(_4x2=0.5, _1x2=0.4, _8x2=0.5))
    assert not estep.monotone(rows(_1x2=0.4, _4x2=0.5, _8x2=0.49))
    assert estep.monotone(rows(_4x2=0.5, _8x1=0.3, _16x1=0.31))
    leading = [{"estep": "1x2:leading", "mean": 0.9}]
    assert estep.monotone([*leading, *rows(_4x2=0.5)])


@pytest.fixture
def weights(folders, tmp_path, monkeypatch):
    """A tiny segmenter under the name "tiny"; on two devices, so that two images are a batch."""
    config = tiny.config(folders)
    task = SegmentationTask(config)
    task.export(task.initial(), tmp_path, {})
    monkeypatch.setattr(estep, "bench_config", lambda weights: (config, tmp_path))
    monkeypatch.setattr(estep, "make_mesh", lambda config: tiny.mesh(data=2))
    return "tiny"


def test_rows_by_seed_and_decoder(weights):
    result = estep.run(weights, ("1x1",), ("vae", "probe"), seeds=(3, 4), images=2)
    assert [(r["decoder"], r["estep"]) for r in result["rows"]] == [("vae", "1x1"), ("probe", "1x1")]
    for row in result["rows"]:
        assert len(row["miou"]) == 2 and row["miou"][0] != row["miou"][1]  # other noise
        assert row["mean"] == pytest.approx(sum(row["miou"]) / 2)
        assert row["seconds_per_image"] > 0
    assert result["codec"] == "binary" and result["calibrated_on"] == "val"
    assert "probe" in estep.table(result)


def test_a_decoder_that_is_none_is_named():
    with pytest.raises(UserError) as caught:
        estep.run("assets:segmenter", ("1x1",), ("mean",), seeds=(0,), images=2)
    assert "'mean'; legal: latent_mean, vae, probe" in one_line(caught.value)
