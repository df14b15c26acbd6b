# SPDX-License-Identifier: Apache-2.0
"""The page of a run that is still training."""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest
from synthetic_run import CLASSES, make_item
from tensorboardX.proto.event_pb2 import Event

from digseg_jax.config.parse import parse
from digseg_jax.config.schema import DataConfig, PartConfig
from digseg_jax.io.metric_writer import MetricWriter
from digseg_jax.log import log
from digseg_jax.report.live import LivePage, training_name
from digseg_jax.viz.gallery import write_gallery


@pytest.fixture
def gallery(tmp_path):
    return write_gallery(tmp_path / "validation" / "gallery", [make_item(0, 32)], CLASSES)


def shown(workdir):
    """Tags and sizes of the images in the run's event files."""
    found = {}
    for path in sorted((workdir / "tensorboard").glob("*")):
        data = path.read_bytes()
        while data:
            length = struct.unpack("<Q", data[:8])[0]
            for value in Event.FromString(data[12 : 12 + length]).summary.value:
                if value.HasField("image"):
                    found[value.tag] = (value.image.height, value.image.width)
            data = data[16 + length :]
    return found


def test_it_shows_the_masks_and_the_curve_so_far_and_is_rewritten(gallery, tmp_path):
    with MetricWriter(tmp_path, active=True) as writer:
        page = LivePage(tmp_path, "landcover", 100)
        for step in (10, 20):
            for i in range(3):
                writer.write(step + i, {"loss": 1 / (step + i), "val_miou": 0.5})
            page(step, writer)
            text = (tmp_path / "report" / "live.html").read_text()
            assert f'>{step}</data> of <data value="100"' in text
    assert 'http-equiv="refresh"' in text and text.count('role="slider"') == 1
    assert text.count('data-what="mask of') == len(CLASSES) and 'id="training"' in text

    # photo, truth, prediction, and eight masks with their colored edges
    (size,) = shown(tmp_path).values()
    assert size == (32, 3 * 32 + 8 * (32 + 6))


@pytest.mark.parametrize(("every", "last"), [(10, 30), (20, 20), (7, 28), (0, 30)])
def test_after_the_last_validation_it_is_not_loaded_again(gallery, tmp_path, every, last):
    config = parse({"train": {"steps": 30}, "logging": {"eval_every": every}})
    page = LivePage.of(tmp_path, config.data, config.train.steps, config.logging.eval_every)
    with MetricWriter(tmp_path, active=True) as writer:
        for step in range(every or 30, 31, every or 30):
            page(step, writer)
            text = (tmp_path / "report" / "live.html").read_text()
            assert ('http-equiv="refresh"' in text) == (step != last)
            assert ("last validation" in text) == (step == last)
            assert ("is written again" in text) == (step != last)
    assert 'href="index.html"' in text


def test_its_title_names_what_is_trained_on():
    leaves = PartConfig("folder", folder="leaves")
    others = (PartConfig("camvid"), PartConfig("folder", root="/data/my cells/"))
    data = DataConfig("landcover", root="/data", mixture=(leaves, *others))
    assert training_name(data) == "leaves, camvid, my cells"
    data = dataclasses.replace(data, mixture=(leaves, *others, PartConfig("monuseg")))
    assert training_name(data) == "a mixture of 4 data sets"
    assert training_name(DataConfig("folder", root="/data/my cells/")) == "my cells"
    assert training_name(DataConfig("camvid", root="/data/x")) == "camvid"


def test_a_page_that_cannot_be_written_does_not_stop_the_run(gallery, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(log, "warning", lambda *a: told.append(a[0] % a[1:]))
    gallery.write_text("[]")
    with MetricWriter(tmp_path, active=True) as writer:
        LivePage(tmp_path, "landcover", 100)(10, writer)
        assert len(told) == 1 and "step 10: no live page" in told[0]
        writer.write_images(1, {"a": np.zeros((4, 6, 3), np.uint8)})
    assert list(shown(tmp_path).values()) == [(4, 6)]
