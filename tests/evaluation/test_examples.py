# SPDX-License-Identifier: Apache-2.0
"""The examples of an evaluation: none lost, nothing resized, and what their scores have to know."""

from __future__ import annotations

import pytest
from PIL import Image

from digseg_jax.config.schema import DataConfig
from digseg_jax.data.datasets import registry
from digseg_jax.errors import UserError
from digseg_jax.evaluation.examples import eval_examples


@pytest.fixture
def camvid(tmp_path):
    for split, count in (("train", 2), ("val", 7)):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
        for i in range(count):
            name = f"{split}{i}"
            Image.new("RGB", (24, 16), (i, 0, 0)).save(tmp_path / "images" / split / f"{name}.jpg")
            Image.new("L", (24, 16), i).save(tmp_path / "annotations" / split / f"{name}.png")
    return DataConfig(name="camvid", root=str(tmp_path))


def test_a_registry_data_set_has_its_own_classes_and_template(camvid):
    examples = eval_examples(camvid, "val")
    facts = registry.spec("camvid")
    assert len(examples) == 7 and examples.classes == facts.names
    assert examples.template == facts.template
    assert examples[3]["name"] == "val3" and (examples[3]["label"] == 3).all()


def test_fewer_images_are_spread_over_the_split(camvid):
    examples = eval_examples(camvid, "val", 3)
    assert [e["name"] for e in (examples[i] for i in range(3))] == ["val0", "val2", "val4"]
    assert len(eval_examples(camvid, "val", 100)) == 7


def test_a_broken_image_is_an_error(camvid, tmp_path):
    (tmp_path / "images" / "val" / "val2.jpg").write_bytes(b"\xff\xd8 no picture")
    examples = eval_examples(camvid, "val")
    with pytest.raises(UserError, match="val2.jpg"):
        examples[2]


def test_a_split_that_is_not_there(camvid):
    with pytest.raises(UserError, match="camvid has no split 'night'"):
        eval_examples(camvid, "night")
