# SPDX-License-Identifier: Apache-2.0
"""Exports in COCO's form, as labeling tools write them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
from PIL import Image

from digseg_jax.data.datasets import registry
from digseg_jax.data.sources import open_dataset
from digseg_jax.errors import UserError

H, W = 6, 8
CATEGORIES = [
    {"id": 1, "name": "coat", "supercategory": "clothes"},
    {"id": 7, "name": "button", "supercategory": "clothes"},
]
SQUARE = [[1, 1, 7, 1, 7, 5, 1, 5]]  # corners: columns 1 to 6, rows 1 to 4
RUNS = {"size": [H, W], "counts": [2 * H + 2, 2, H * W - 2 * H - 4]}  # column 2, rows 2 and 3
EXPECTED = np.zeros((H, W), int)
EXPECTED[1:5, 1:7] = 1
EXPECTED[2:4, 2] = 2


def values(**changes):
    """Two images, of which the second one shows nothing."""
    images = [{"id": i, "file_name": f"{i}.jpg", "height": H, "width": W} for i in (3, 9)]
    annotations = [
        {"id": 2, "image_id": 3, "category_id": 7, "segmentation": RUNS, "iscrowd": 1},
        {"id": 1, "image_id": 3, "category_id": 1, "segmentation": SQUARE, "iscrowd": 0},
    ]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES} | changes


def write(root, layouts, content=None):
    """Annotation files by path, each with the folder of its images."""
    for file, images in layouts.items():
        (root / images).mkdir(parents=True, exist_ok=True)
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(json.dumps(content or values()))
        for name in ("3.jpg", "9.jpg"):
            Image.new("RGB", (W, H)).save(root / images / name)


LAYOUTS = {
    "roboflow": {f"{s}/_annotations.coco.json": s for s in ("train", "valid")},
    "coco": {f"annotations/instances_{s}.json": f"images/{s}" for s in ("train", "val")},
    "coco2017": {f"annotations/instances_{s}.json": s for s in ("train2017", "val2017")},
    "cvat": {"annotations/instances_default.json": "images"},
    "label studio": {"result.json": "images"},
    "labelme": {"annotations.json": "JPEGImages"},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_polygons_and_runs_of_each_tool_become_a_label_map(tmp_path, name):
    write(tmp_path, LAYOUTS[name])
    spec = registry.spec("folder", tmp_path)
    assert spec.names == ("background", "coat", "button")
    wanted = {"roboflow": ["train", "valid"], "coco": ["train", "val"],
              "coco2017": ["train2017", "val2017"]}.get(name, [])  # fmt: skip
    assert spec.undivided == (not wanted) and sorted(spec.splits) == (wanted or ["train", "val"])
    opened = [registry.open_source("folder", tmp_path, split) for split in spec.splits]
    assert [len(source) for source in opened] == ([2, 2] if wanted else [1, 1])
    examples = opened[-1] if wanted else [source[0] for source in opened]
    first, second = sorted(examples, key=lambda example: str(example["name"]))
    np.testing.assert_array_equal(first["label"], EXPECTED)
    assert not second["label"].any() and first["image"].shape == (H, W, 3)


def test_runs_packed_as_text_are_the_same(tmp_path):
    packed = {"size": [H, W], "counts": _packed(RUNS["counts"])}
    annotations = [{"id": 1, "image_id": 3, "category_id": 7, "segmentation": packed}]
    write(tmp_path, LAYOUTS["cvat"], values(annotations=annotations))
    label = registry.open_source("folder", tmp_path, "train")[0]["label"]
    np.testing.assert_array_equal(label, 2 * (EXPECTED == 2))


def _packed(runs):
    """COCO's text form of run lengths; the inverse of `rle.unpack`, as pycocotools has it."""
    text = ""
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(48 + (bits | 32 if more else bits))
    return text


def test_roboflows_heading_is_no_class(tmp_path):
    heading = {"id": 0, "name": "clothes", "supercategory": "none"}
    write(tmp_path, LAYOUTS["roboflow"], values(categories=[heading, *CATEGORIES]))
    assert registry.spec("folder", tmp_path).names == ("background", "coat", "button")


def test_a_class_that_is_its_own_heading_may_lack_in_a_split(tmp_path):
    """COCO's person; and a heading that is a class in one split alone."""
    own = [{"id": 1, "name": "person", "supercategory": "person"},
           {"id": 7, "name": "button", "supercategory": "person"}]  # fmt: skip
    first, second = LAYOUTS["coco"].items()
    annotations = values()["annotations"]
    write(tmp_path, dict([first]), values(categories=own))
    write(tmp_path, dict([second]), values(categories=own, annotations=annotations[:1]))
    assert registry.spec("folder", tmp_path).names == ("background", "person", "button")


def named(*files):
    """Annotations of images with these names, each with its own class."""
    images = [
        {"id": i, "file_name": name, "height": H, "width": W} for i, name in enumerate(files, start=1)
    ]
    annotations = [
        {"id": i, "image_id": i, "category_id": 1, "segmentation": SQUARE}
        for i in range(1, len(files) + 1)
    ]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def save(root, *places):
    for place in places:
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (W, H)).save(root / place)


@pytest.mark.parametrize(
    ("there", "listed"),
    [
        (["images/cam1/1.png", "images/cam2/1.png"], ["cam1\\1.png", "cam2\\1.png"]),
        (["images/1.png", "images/cam2/1.png"], ["1.png", "cam2/1.png"]),
        (["images/Stra\u00dfe_a\u0308.png", "images/b.png"], ["Stra\u00dfe_\u00e4.png", "b.png"]),
        (["images/a/1.png", "images/b/1.png"], ["images/a/1.png", "images/b/1.png"]),
        (["images/a b.png", "images/c.png"], ["a%20b.png", "c.png"]),
        (["images/a%20b.png", "images/c.png"], ["a%20b.png", "some/where/c.png"]),
    ],
)
def test_an_image_is_found_however_its_name_is_written(tmp_path, there, listed):
    save(tmp_path, *there)
    (tmp_path / "result.json").write_text(json.dumps(named(*listed)))
    sources = [registry.open_source("folder", tmp_path, split) for split in ("train", "val")]
    assert sorted(str(s[0]["name"]) for s in sources) == sorted(listed)
    opened = {str(s.files(0)["image"].relative_to(tmp_path)) for s in sources}
    assert opened == set(there)


def test_an_image_that_was_not_copied_gets_no_others_masks(tmp_path):
    save(tmp_path, "images/cam1/1.png")
    (tmp_path / "result.json").write_text(json.dumps(named("cam1/1.png", "cam2/1.png")))
    with pytest.raises(UserError, match="'cam1/1.png' and 'cam2/1.png' there is only one, "):
        registry.open_source("folder", tmp_path, "train")


def test_an_empty_folder_of_the_splits_name_holds_no_images(tmp_path):
    write(tmp_path, {"annotations/instances_train.json": "images"})
    (tmp_path / "train").mkdir()
    assert len(registry.open_source("folder", tmp_path, "train")) == 2


def row(**changes):
    return values(annotations=[values()["annotations"][1] | changes])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"images": []}, "has no key 'categories'"),
        (values(categories=[]), "no categories"),
        (values(categories=[*CATEGORIES, {"id": 9, "name": "Coat"}]), "two categories have one name"),
        (values(annotations=[3]), r"annotations\[0\]: is not an object"),
        (row(category_id=5), r"annotations\[0\]: no entry of categories has the category_id 5"),
        (row(image_id=4), r"annotations\[0\]: no entry of images has the image_id 4"),
        (values(categories=[*CATEGORIES, {"id": 7, "name": "x"}]), r"categories\[2\]: a second id 7"),
        (values(images=[*values()["images"]] * 2), r"images\[2\]: a second id 3"),
        (values(categories=[*CATEGORIES, {"id": 9, "name": " "}]), r"\[2\]: ' ' is not a name"),
        (values(categories=[*CATEGORIES, {"id": 9, "name": "\ud83d"}]), r"'.ud83d' is not a name"),
        (row(category_id="x"), r"annotations\[0\]: 'category_id' is 'x', expected int"),
        (row(segmentation=[[1, 2]]), "annotation 1: a polygon of 2 numbers"),
        (row(segmentation=[["1"] * 6]), "annotation 1: a polygon of other things than numbers"),
        (row(segmentation=[]), "annotation 1: a box without an outline"),
        (row(segmentation=[[1e9] * 6]), "annotation 1: a polygon far outside the image"),
        (row(segmentation={"size": [H, W], "counts": [1]}), "1: the run lengths do not fill"),
        (row(segmentation={"size": [10**6, 10**6], "counts": [10**12]}), "1: runs for a mask"),
        (values(images=[{"id": 3, "file_name": "3.jpg", "height": 5, "width": 5}]), "the image has"),
        (values(images=[{"id": 3, "file_name": "4.jpg", "height": H, "width": W}]), "is not there"),
    ],
    ids=lambda x: x[:25] if isinstance(x, str) else "",
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(tmp_path, content, told):
    write(tmp_path, LAYOUTS["cvat"], content)
    with pytest.raises(UserError, match=told) as caught:
        registry.spec("folder", tmp_path)
        registry.open_source("folder", tmp_path, "train")[0]
    assert "instances_default.json" in tiny.one_line(caught.value)


def test_a_split_without_an_image_is_told(tmp_path):
    write(tmp_path, LAYOUTS["cvat"], values(images=[], annotations=[]))
    with pytest.raises(UserError, match="train: no example in") as caught:
        open_dataset("folder", str(tmp_path), "train")
    tiny.one_line(caught.value)


def test_pycocotools_fills_nearly_the_same_pixels(tmp_path):
    """Its polygons reach some pixels of the border that centers leave out; runs agree exactly."""
    mask = pytest.importorskip("pycocotools.mask")
    make = np.random.default_rng(0)
    angles = np.sort(make.uniform(0, 2 * np.pi, 40))
    radii = make.uniform(60, 90, 40)
    points = np.stack([100 + radii * np.cos(angles), 100 + radii * np.sin(angles)], 1)
    image = {"id": 1, "file_name": "1.png", "height": 200, "width": 200}
    polygon = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [points.ravel().tolist()]}
    content = {"images": [image], "annotations": [polygon], "categories": CATEGORIES}
    (tmp_path / "result.json").write_text(json.dumps(content))
    Image.new("RGB", (200, 200)).save(tmp_path / "1.png")
    ours = registry.open_source("folder", tmp_path, "train")[0]["label"] == 1
    theirs = mask.decode(mask.merge(mask.frPyObjects([points.ravel().tolist()], 200, 200))) == 1
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.98
