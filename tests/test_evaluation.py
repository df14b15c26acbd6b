# SPDX-License-Identifier: Apache-2.0
"""The evaluation side of the data: nothing resized, nothing lost, padding told from pictures."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from digseg_jax.config import DataConfig
from digseg_jax.data import registry
from digseg_jax.data.augment import PADDING
from digseg_jax.data.evaluation import eval_examples, padded_batches
from digseg_jax.errors import UserError

SIZES = [(30, 50), (30, 50), (70, 20), (10, 10), (64, 64)]


def example(i):
    rng = np.random.default_rng(i)
    image = rng.integers(0, 256, (*SIZES[i], 3), np.uint8)
    return {"image": image, "label": rng.integers(-1, 5, SIZES[i]).astype(np.int32), "name": f"n{i}"}


EXAMPLES = [example(i) for i in range(len(SIZES))]


def test_every_pixel_comes_back_and_what_is_padding_says_so():
    seen = []
    for batch, names in padded_batches(EXAMPLES, 2, multiple=32):
        assert batch["label"].shape[0] == 2 and len(names) == batch["valid"].sum()
        for k, name in enumerate(names):
            i = int(batch["index"][k])
            h, w = batch["size"][k]
            assert name == f"n{i}" and (h, w) == SIZES[i]
            np.testing.assert_array_equal(batch["image"][k, :h, :w], EXAMPLES[i]["image"])
            np.testing.assert_array_equal(batch["label"][k, :h, :w], EXAMPLES[i]["label"])
            rest = np.ones(batch["label"].shape[1:], bool)
            rest[:h, :w] = False
            assert (batch["label"][k][rest] == -1).all()
            assert (batch["image"][k][rest] == PADDING).all()
            seen.append(i)
        for k in range(len(names), 2):
            assert (batch["label"][k] == -1).all()
    assert seen == list(range(len(SIZES)))


def test_shapes_are_multiples_and_as_few_as_the_sizes_allow():
    shapes = [b["label"].shape[1:] for b, _ in padded_batches(EXAMPLES, 2, multiple=32)]
    assert shapes == [(32, 64), (96, 32), (64, 64)]
    one_size = [b["label"].shape for b, _ in padded_batches([EXAMPLES[0]] * 5, 2)]
    assert set(one_size) == {(2, 64, 64)}


def test_pictures_of_another_size_keep_their_labels():
    for batch, names in padded_batches(EXAMPLES, 2, multiple=32, short_side=16):
        for k in range(len(names)):
            i = int(batch["index"][k])
            (h, w), (height, width) = SIZES[i], batch["image_size"][k]
            assert min(height, width) == 16 and abs(height * w - width * h) <= max(h, w) / 2
            np.testing.assert_array_equal(batch["label"][k, :h, :w], EXAMPLES[i]["label"])
            assert (batch["image"][k, height:] == PADDING).all()
            assert (batch["image"][k, :, width:] == PADDING).all()
            difference = batch["image"][k, :height, :width].mean() - EXAMPLES[i]["image"].mean()
            assert abs(difference) < 2
        assert batch["image"].shape[1] % 32 == batch["image"].shape[2] % 32 == 0


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


def test_a_registry_data_set_has_its_own_classes_and_prompts(camvid):
    examples = eval_examples(camvid, "val")
    facts = registry.spec("camvid")
    assert len(examples) == 7 and examples.classes == facts.names
    assert examples.prompts == tuple(facts.prompt(n) for n in facts.names)
    assert examples[3]["name"] == "val3" and (examples[3]["label"] == 3).all()


def test_fewer_images_are_spread_over_the_split(camvid):
    examples = eval_examples(camvid, "val", 3)
    assert [e["name"] for e in (examples[i] for i in range(3))] == ["val0", "val2", "val4"]
    assert len(eval_examples(camvid, "val", 100)) == 7


def test_a_broken_image_is_an_error_even_where_training_skips(camvid, tmp_path):
    (tmp_path / "images" / "val" / "val2.jpg").write_bytes(b"\xff\xd8 no picture")
    examples = eval_examples(dataclasses.replace(camvid, on_error="skip"), "val")
    with pytest.raises(UserError, match="val2.jpg"):
        examples[2]


def test_a_split_that_is_not_there(camvid):
    with pytest.raises(UserError, match="camvid has no split 'dev'"):
        eval_examples(camvid, "dev")
