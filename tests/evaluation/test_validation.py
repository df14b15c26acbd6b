# SPDX-License-Identifier: Apache-2.0
"""The look at val while training: few images, the columns of a collapse, and its one-line alarm."""

from __future__ import annotations

import dataclasses
import json
import logging

import jax
import pytest
import tiny
from PIL import Image

from digseg_jax.config.schema import Config
from digseg_jax.errors import UserError
from digseg_jax.evaluation import validation
from digseg_jax.evaluation.validation import make_validation, validation_examples
from digseg_jax.training.tasks.segmentation import SegmentationTask
from digseg_jax.viz.gallery import GALLERY_NAME

COLUMNS = {"val_miou", "val_empty_rate", "val_present_dice", "val_absent_area"}


@pytest.mark.parametrize(
    ("eval_images", "num_images", "count"), [(16, 0, 16), (16, 2, 2), (0, 3, 3), (4, 9, 4), (0, 0, 55)]
)
def test_it_looks_at_a_few_images_of_val(eval_images, num_images, count, cover):
    settings = dataclasses.replace(Config().eval, num_images=num_images)
    examples = validation_examples(Config().data, settings, eval_images)
    assert len(examples) == count and examples.split == "val"
    assert examples.rows == validation_examples(Config().data, settings, eval_images).rows


def test_without_val_it_looks_at_the_scored_split_but_chooses_nothing_by_it(tmp_path):
    for kind, mode, ending in (("images", "RGB", "jpg"), ("annotations", "L", "png")):
        (tmp_path / kind / "test").mkdir(parents=True)
        Image.new(mode, (24, 16)).save(tmp_path / kind / "test" / f"0.{ending}")
    data = dataclasses.replace(Config().data, name="camvid", root=str(tmp_path))
    assert validation_examples(data, Config().eval, 0).split == "test"
    with pytest.raises(UserError, match="on the scored split") as caught:
        validation_examples(data, Config().eval, 0, chosen_by="val_miou")
    assert "config.checkpoint.best='val_miou'" in tiny.one_line(caught.value)


def test_its_columns_its_alarm_and_its_gallery(folders, cover, caplog, monkeypatch, tmp_path):
    config = tiny.config(folders, eval__view_size=(32,), eval__num_images=1)
    task = SegmentationTask(config)
    examples = validation_examples(config.data, config.eval, config.logging.eval_images)
    look = make_validation(examples, config.eval, config.seed, task, tiny.mesh(), tmp_path)
    state = {"params": jax.tree.map(jax.numpy.asarray, task.initial())}
    with caplog.at_level(logging.WARNING):
        found = look(7, state)
    assert found.keys() == COLUMNS
    assert all(0.0 <= value <= 1.0 for value in found.values())
    told = [r.getMessage() for r in caplog.records if "empty masks" in r.getMessage()]
    assert bool(told) == (found["val_empty_rate"] > validation.EMPTY_ALARM)
    monkeypatch.setattr(validation, "EMPTY_ALARM", -1.0)
    with caplog.at_level(logging.WARNING):
        assert look(9, state) == found
    assert "step 9: " in caplog.text

    # The same image each time, with a mask of every class that its label shows.
    gallery = json.loads((tmp_path / "validation" / "gallery" / GALLERY_NAME).read_text())
    (item,) = gallery["items"]
    assert item["queries"] and {q["name"] for q in item["queries"]} <= set(item["classes"])
