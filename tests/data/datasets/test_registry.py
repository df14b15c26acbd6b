# SPDX-License-Identifier: Apache-2.0
"""Class lists and readers against what others wrote: packages where they install, facts otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import official_trees as trees
import pytest

from digseg_jax.config.templates import fill
from digseg_jax.data.datasets import registry
from digseg_jax.data.datasets.spec import load_classes, shipped_list, unambiguous
from digseg_jax.tools import check_data

FACTS = Path(__file__).parents[4] / "shared" / "classes"
ALL = sorted(set(registry.names()) - {"folder"})

# data set -> classes, official labeled images of train and of the split for evaluation
KNOWN = {
    "ade20k": (150, 20_210, 2_000),
    "ade20k_847": (847, 25_574, 2_000),
    "bdd100k": (19, 7_000, 1_000),
    "camvid": (11, 367, 101),
    "cityscapes": (19, 2_975, 500),
    "coco_stuff": (171, 118_287, 5_000),
    "deepglobe": (2, 4_696, 1_530),
    "landcover": (8, 198, 81),
    "landcover_igbp": (17, 198, 81),
    "monuseg": (2, 30, 14),
    "pascal_context_59": (59, 4_998, 5_105),
    "pascal_context_459": (459, 4_998, 5_105),
    "pascal_voc": (20, 1_464, 1_449),
    "pascal_voc_21": (21, 1_464, 1_449),
    "phenobench": (3, 1_407, 772),
    "refuge2": (3, 400, 400),
}


@pytest.mark.parametrize("name", ALL)
def test_numbers_of_classes_and_images(name):
    facts = registry.spec(name)
    counts = (facts.splits[facts.train_split], facts.splits[facts.eval_split])
    assert (facts.num_classes, *counts) == KNOWN[name]
    assert facts.name == name and facts.license and facts.ignore and facts.title
    assert set(facts.extra_splits) < set(facts.splits)


@pytest.mark.parametrize("name", ALL)
def test_every_value_means_one_thing_and_every_class_one_name(name):
    facts = registry.spec(name)
    values = [v for c in facts.classes for v in c.raw] + list(facts.ignored_raw)
    assert len(set(values)) == len(values)
    assert len(set(facts.names)) == facts.num_classes
    for class_id, info in enumerate(facts.classes):
        assert class_id in facts.covers(class_id)
        assert fill(facts.template, info.name).count(info.name) == 1


def test_rules_of_scores_are_known_ones():
    from digseg_jax.metrics.confusion import ABSENT_RULES

    for name in ALL:
        facts = registry.spec(name)
        assert facts.absent in ABSENT_RULES
        assert facts.metric in ("miou", "foreground", "region_dice")


def test_ambiguous_synonyms_are_dropped_for_all():
    from digseg_jax.data.datasets.spec import ClassInfo

    classes = [ClassInfo("bag", ("sack", "purse")), ClassInfo("Purse", ("handbag", "sack"))]
    assert [c.synonyms for c in unambiguous(classes)] == [(), ("handbag",)]


def test_shipped_lists():
    train, test = shipped_list("monuseg_train"), shipped_list("monuseg_test")
    assert len(set(train)) == 30 and len(set(test)) == 14 and not set(train) & set(test)
    roads = shipped_list("deepglobe_test")
    assert len(set(roads)) == 1_530 and all(r.isdigit() for r in roads)


def test_cityscapes_by_golden_facts():
    raw = [c.raw[0] for c in registry.spec("cityscapes").classes]
    assert raw == [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    colors = {c.name: c.color for c in registry.spec("cityscapes").classes}
    assert colors["road"] == (128, 64, 128) and colors["bicycle"] == (119, 11, 32)


def test_cityscapes_agrees_with_its_scripts():
    labels = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    ours = registry.spec("cityscapes")
    for label in labels:
        if 0 <= label.trainId < 255:
            info = ours.classes[label.trainId]
            assert (info.name, info.raw, info.color) == (label.name, (label.id,), label.color)
        elif label.id >= 0:
            assert label.id in ours.ignored_raw


def test_bdd100k_agrees_with_its_package():
    labels = pytest.importorskip("bdd100k.label.label").labels
    ours = registry.spec("bdd100k")
    train = {label.trainId: label for label in labels if label.trainId < 255}
    assert len(train) == ours.num_classes
    for train_id, label in train.items():
        info = ours.classes[train_id]
        assert (info.name, info.color, info.raw) == (label.name, label.color, (train_id,))


@pytest.mark.skipif(not FACTS.is_dir(), reason="the compiled facts are not beside the checkout")
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("ade20k", "ade20k_150"),
        ("ade20k_847", "ade20k_847"),
        ("bdd100k", "bdd100k_19"),
        ("cityscapes", "cityscapes_19"),
        ("coco_stuff", "coco_stuff_171"),
        ("pascal_context_59", "pascal_context_59"),
        ("pascal_context_459", "pascal_context_459"),
        ("pascal_voc", "pascal_voc_20"),
    ],
)
def test_class_lists_agree_with_the_compiled_facts(name, file):
    rows = json.loads((FACTS / f"{file}.json").read_text(encoding="utf-8"))["classes"]
    for info, row in zip(load_classes(name)["classes"], rows, strict=True):
        assert (info.name, info.raw) == (row["name"], (row["raw_id"],))
        assert info.color == (tuple(row["color"]) if row.get("color") else None)


def test_phenobench_agrees_with_its_loader(tmp_path):
    loader = pytest.importorskip("phenobench")
    trees.phenobench(tmp_path)
    theirs = loader.PhenoBench(str(tmp_path / "PhenoBench"), split="val", target_types=["semantics"])
    ours = registry.open_source("phenobench", tmp_path, "val")
    assert len(theirs) == len(ours) == 1
    np.testing.assert_array_equal(ours[0]["label"], theirs[0]["semantics"])
    np.testing.assert_array_equal(ours[0]["image"], np.asarray(theirs[0]["image"]))


def test_pixel_counts_agree_with_scikit_learn(tmp_path):
    metrics = pytest.importorskip("sklearn.metrics")
    trees.cityscapes(tmp_path)
    facts, source = registry.spec("cityscapes"), registry.open_source("cityscapes", tmp_path, "val")
    found, _ = check_data.check_split(facts, source, "val")
    label = source[0]["label"].ravel()
    counts = metrics.confusion_matrix(label, label, labels=[*range(facts.num_classes), -1]).diagonal()
    ours = [*found["pixel_share"].values(), found["ignored_share"]]
    np.testing.assert_allclose(np.array(ours) * label.size, counts)


def test_full_ade_agrees_with_its_benchmarks_conversion(tmp_path):
    """The steps of the published conversion, written apart from the reader, through a 16-bit TIFF."""
    import cv2
    from PIL import Image

    trees.ade20k_847(tmp_path)
    rng = np.random.default_rng(0)
    raw = rng.choice([0, 2978, 312, 3124, 999], (90, 70)).repeat(10, axis=0).repeat(8, axis=1)
    trees.image(next(tmp_path.rglob("ADE_val*.jpg")), *raw.shape)
    file = next(tmp_path.rglob("ADE_val*_seg.png"))
    trees.seg_png(file, raw)
    coded = np.array(Image.open(file)).astype(np.int32)
    objects = coded[..., 0] // 10 * 256 + coded[..., 1]
    height, width = objects.shape  # 900 x 560: the short side is the width
    size = (512, round(height / float(width) * 512))
    objects = cv2.resize(objects, size, interpolation=cv2.INTER_NEAREST)
    stored = np.full(objects.shape, 65535, np.uint16)
    for class_id, info in enumerate(registry.spec("ade20k_847").classes):
        stored[objects == info.raw[0]] = class_id
    Image.fromarray(stored).save(tmp_path / "label.tif")
    expected = np.asarray(Image.open(tmp_path / "label.tif")).astype(np.int32)
    expected[expected == 65535] = -1
    picture = np.asarray(Image.open(next(tmp_path.rglob("ADE_val*.jpg"))))
    Image.fromarray(cv2.resize(picture, size, interpolation=cv2.INTER_LINEAR)).save(tmp_path / "i.jpg")
    example = registry.open_source("ade20k_847", tmp_path, "val")[0]
    np.testing.assert_array_equal(example["label"], expected)
    np.testing.assert_array_equal(example["image"], np.asarray(Image.open(tmp_path / "i.jpg")))
