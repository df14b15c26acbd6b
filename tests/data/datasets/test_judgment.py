# SPDX-License-Identifier: Apache-2.0
"""What labels say of a run: told by the check of data, and at the start of a training."""

from __future__ import annotations

import logging
import unicodedata

import numpy as np
import official_trees as trees
import pytest
import tiny
from PIL import Image

from digseg_jax.config.parse import default, parse, with_settings
from digseg_jax.config.schema import PartConfig
from digseg_jax.data.checked import Guarded
from digseg_jax.data.datasets import registry
from digseg_jax.data.datasets.splits import split_called
from digseg_jax.data.datasets.statistics import ClassStatistics
from digseg_jax.data.sources import (
    check_labels,
    check_scored_splits,
    check_training_data,
    open_part,
    spec_of,
    statistics_of,
    title_of,
)
from digseg_jax.errors import UserError
from digseg_jax.tools import check_data

H, W = 4, 5


def folder(root, masks, classes="soil\nroad\n", splits=("train", "val"), layout="{part}/{split}"):
    """A user's own data: `masks` in every split."""
    root.mkdir(exist_ok=True)
    (root / "classes.txt").write_text(classes)
    for split in splits:
        for i, mask in enumerate(masks):
            trees.image(root / layout.format(part="images", split=split) / f"{i}.jpg", H, W)
            place = root / layout.format(part="masks", split=split) / f"{i}.png"
            trees.save(place, np.broadcast_to(mask, (H, W)))
    return root


def mask(*values: int) -> np.ndarray:
    return np.resize(values, (H, W))


def checked(root, capsys) -> tuple[int, str]:
    status = check_data.main(["--dataset=folder", f"--root={root}", "--sheet=-"])
    return status, capsys.readouterr().out


def start(root) -> None:
    part = PartConfig("folder", str(root))
    source = open_part(part, "train")
    facts = spec_of(part)
    statistics = statistics_of(source, Guarded(source, facts.num_classes))
    check_labels(facts, title_of(part), "train", statistics, len(source))


CURE = "255 is ignored: if it is 'road' in the masks, write `255: road` into classes.txt"


@pytest.mark.parametrize(
    ("masks", "classes", "told"),
    [
        ([mask(0, 255)], "soil\nroad\n", ["that counts is 'soil'", CURE]),
        ([mask(255)], "soil\nroad\n", ["every pixel of 1 examples is ignored", CURE]),
        ([mask(1)] * 3, "soil\nroad\n", ["every pixel of 3 examples that counts is 'road'"]),
        ([mask(0)], "soil\n", ["'soil' is the only class", "`0: background`"]),
        ([mask(0), mask(9)], "0: soil\n9: ignore\n", ["'soil' is the only class"]),
    ],
    ids=["0 and 255", "all ignored", "constant", "one class", "one class and ignore"],
)  # fmt: skip
def test_labels_that_make_a_run_pointless(tmp_path, capsys, masks, classes, told):
    root = folder(tmp_path, masks, classes)
    status, out = checked(root, capsys)
    assert status == 1 and all(words in out for words in told), out
    with pytest.raises(UserError) as caught:
        start(root)
    assert all(words in tiny.one_line(caught.value) for words in told)


def test_what_is_odd_and_may_be_right_is_a_note(tmp_path, capsys, caplog):
    root = folder(tmp_path, [mask(0, 1, 255, 255, 255)], "soil\nroad\nsky\n")
    status, out = checked(root, capsys)
    assert status == 0 and "no pixel in 1 examples: sky; 255 is ignored: if it is 'sky'" in out
    assert "60 % of the pixels are ignored (255)" in out
    with caplog.at_level(logging.WARNING, "digseg_jax"):
        start(root)
    assert f"folder {root.name} train: no pixel in 1 examples: sky" in caplog.text


def test_the_line_that_was_told_cures_it(tmp_path, capsys):
    root = folder(tmp_path, [mask(0, 255)], "0: soil\n255: road\n")
    status, out = checked(root, capsys)
    assert status == 0 and "nothing is wrong" in out


def test_a_sample_is_no_proof():
    spec = registry.spec("camvid")
    statistics = ClassStatistics.empty(spec.num_classes)
    statistics.add(np.full((2, 2), 3, np.int32))
    check_labels(spec, spec.name, "train", statistics, 300)
    with pytest.raises(UserError, match="every pixel of 1 examples that counts is 'road'"):
        check_labels(spec, spec.name, "train", statistics, 1)


@pytest.mark.parametrize("name", ["valid", "validation"])
def test_a_validation_split_of_another_name_is_evaluated(tmp_path, name, capsys):
    root = folder(tmp_path, [mask(0, 1)], splits=("train", name))
    assert len(open_part(PartConfig("folder", str(root)), "val")) == 1
    assert spec_of(PartConfig("folder", str(root))).eval_split == name
    assert checked(root, capsys)[0] == 0
    assert split_called("val", ["train", "validation"]) == "validation"
    assert split_called("val", ["train", "test"]) == "val"


def test_flat_folders_are_told(tmp_path):
    trees.image(tmp_path / "images" / "a.jpg", H, W)
    (tmp_path / "classes.txt").write_text("soil\nroad\n")
    with pytest.raises(UserError) as caught:
        registry.spec("folder", tmp_path)
    assert f"{tmp_path / 'images'}: no folders of splits in it; images belong to images/train" in str(
        caught.value
    )


def test_flat_folders_with_masks_are_divided(tmp_path):
    root = folder(tmp_path / "split", [mask(0, 1)] * 3, splits=("train",))
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
        for file in (root / part / "train").iterdir():
            file.rename(tmp_path / part / file.name)
    (root / "classes.txt").rename(tmp_path / "classes.txt")
    assert [len(registry.open_source("folder", tmp_path, s)) for s in ("train", "val")] == [2, 1]


def test_layouts_that_people_have(tmp_path):
    """Split first; masks of another stem; folders below a split; names in both of Unicode's forms."""
    root = folder(tmp_path / "a", [mask(0, 1)], layout="{split}/{part}")
    assert len(registry.open_source("folder", root, "train")) == 1

    root = folder(tmp_path / "b", [mask(0, 1)])
    (root / "masks/train/0.png").rename(root / "masks/train/0_mask.png")
    for part, ending in (("images", "jpg"), ("masks", "png")):
        (root / part / "train" / "more").mkdir()
        (root / part / f"train/more/0.{ending}").write_bytes(
            (root / part / f"val/0.{ending}").read_bytes()
        )
    names = [example["name"] for example in registry.open_source("folder", root, "train")]
    assert names == ["0", "more/0"]

    # Links to folders on another disk are followed, once each.
    for part in ("images", "masks"):
        (root / part / "train" / "more").rename(tmp_path / f"other_{part}")
        (root / part / "train" / "more").symlink_to(tmp_path / f"other_{part}")
        (root / part / "train" / "round").symlink_to(root / part)
    assert [e["name"] for e in registry.open_source("folder", root, "train")] == names

    root = folder(tmp_path / "c", [mask(0, 1)])
    for part, ending, form in (("images", "jpg", "NFD"), ("masks", "png", "NFC")):
        name = unicodedata.normalize(form, f"grün.{ending}")
        (root / part / "train" / f"0.{ending}").rename(root / part / "train" / name)
    assert len(registry.open_source("folder", root, "train")) == 1


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("Images/Train/0.jpg", "Labels/Train/0.png"),
        ("img_dir/train2017/0.jpg", "ann_dir/train2017/0.png"),
        ("train/image/0.jpg", "train/gt/0.png"),
        ("images/train/0.jpg", "masks/train/0.jpg.png"),
        ("images/train/0.jpg", "masks/train/mask_0.png"),
        ("images/train/img_0.jpg", "masks/train/label_0.png"),
        ("images/train/0.png", "masks/train/0_L.png"),
        ("images/train/more/0.jpg", "masks/train/more/GT-0.png"),
    ],
)
def test_names_of_folders_and_masks_that_people_have(tmp_path, image, label):
    (tmp_path / "classes.txt").write_text("soil\nroad\n")
    trees.image(tmp_path / image, H, W)
    trees.save(tmp_path / label, mask(0, 1))
    (example,) = registry.open_source("folder", tmp_path, "train")
    np.testing.assert_array_equal(example["label"], mask(0, 1))


def test_two_masks_of_one_image_are_told(tmp_path):
    """The first was replaced by the second, without a word."""
    root = folder(tmp_path, [mask(0, 1)])
    trees.save(root / "masks/train/0_mask.png", mask(0, 1))
    with pytest.raises(UserError, match="0.png and masks/train/0_mask.png are masks of one image"):
        registry.open_source("folder", root, "train")
    trees.image(root / "images/train/0_mask.jpg", H, W)  # an image of that very name
    assert len(registry.open_source("folder", root, "train")) == 2


def test_a_folder_above_the_data_is_told(tmp_path):
    root = folder(tmp_path / "mine", [mask(0, 1)])
    with pytest.raises(UserError, match="name the folder that holds classes.txt"):
        registry.spec("folder", tmp_path)
    (root / "classes.txt").rename(tmp_path / "classes.txt")
    with pytest.raises(UserError, match=f"holds splits: use {root} as the data set"):
        registry.spec("folder", tmp_path)


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("labelmap.txt", "labelmap.txt"),
        ("train_masks/a.png", "move train to images/train, and train_masks to masks/train"),
        ("SegmentationClass/a.png", "VOC-style"),
        ("data.yaml", "YOLO"),
        ("labels/train/a.txt", "YOLO"),
        ("annotations.xml", "CVAT's own XML"),
        ("meta.json", "Supervisely"),
        ("Annotations/a.xml", "boxes in XML"),
        ("train/a.json", "labelme"),
        ("via_region_data.json", "VIA"),
        ("data.zip", "archive: unpack it"),
        ("data.tar.gz", "archive: unpack it"),
    ],
)
def test_other_layouts_are_recognized(tmp_path, file, told):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("{}")
    with pytest.raises(UserError) as caught:
        registry.spec("folder", tmp_path)
    assert "classes.txt: no such file (this is" in tiny.one_line(caught.value)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "name", ["Classes.TXT", "classes.txt.txt", "labels.txt", "class_names.txt", "images/classes.txt"]
)
def test_a_list_of_classes_of_another_name_is_named(tmp_path, name):
    root = folder(tmp_path, [mask(0, 1)])
    (root / "classes.txt").rename(root / name)
    with pytest.raises(UserError) as caught:
        registry.spec("folder", root)
    line = tiny.one_line(caught.value)
    assert line.endswith(f"no such file; {root / name} is there: call it {root / 'classes.txt'}")


def test_images_beside_the_folders_of_splits_are_not_left_out(tmp_path):
    root = folder(tmp_path, [mask(0, 1)])
    trees.image(root / "images" / "stray.jpg", H, W)
    with pytest.raises(UserError, match="1 images beside the folders of splits, such as stray.jpg"):
        registry.spec("folder", root)


def test_a_folder_above_everything_is_taken_for_no_export(tmp_path):
    (tmp_path / "project/lib/package").mkdir(parents=True)
    (tmp_path / "project/lib/package/build.xml").write_text("<project/>")
    with pytest.raises(UserError) as caught:
        registry.spec("folder", tmp_path)
    assert tiny.one_line(caught.value).endswith("classes.txt: no such file")


def test_jpeg_masks_are_told(tmp_path):
    root = folder(tmp_path, [mask(0, 1)])
    (root / "masks/train/0.png").unlink()
    trees.image(root / "masks/train/0.jpg", H, W)
    with pytest.raises(UserError, match="end in .jpg .JPEG and WebP change values at edges.; save"):
        registry.open_source("folder", root, "train")
    (root / "masks/train/0.jpg").rename(root / "masks/train/0.npy")
    with pytest.raises(UserError, match="masks/train end in .npy; save the masks as PNG"):
        registry.open_source("folder", root, "train")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA"])
def test_indices_are_read_from_gray_in_any_mode_and_from_no_color(tmp_path, mode):
    root, file = folder(tmp_path, [mask(0)], splits=("train",)), tmp_path / "masks/train/0.png"
    gray = Image.fromarray(mask(0, 1).astype(np.uint8)).convert(mode)
    gray.save(file)
    np.testing.assert_array_equal(registry.open_source("folder", root, "train")[0]["label"], mask(0, 1))
    if mode != "L":
        gray.putpixel((0, 0), {"RGB": (1, 0, 0), "RGBA": (1, 1, 1, 9), "LA": (1, 9)}[mode])
        gray.save(file)
        with pytest.raises(UserError, match=f"mode {mode}; a label has one channel"):
            _ = registry.open_source("folder", root, "train")[0]


@pytest.mark.parametrize("mode", ["RGB", "P", "L", "RGBA"])
def test_colors_of_a_list_are_found_in_masks_of_any_mode(tmp_path, mode):
    root = folder(tmp_path, [mask(0)], "#000000: soil\n#ffffff: road\n", splits=("train",))
    Image.fromarray(mask(0, 255).astype(np.uint8)).convert(mode).save(root / "masks/train/0.png")
    label = registry.open_source("folder", root, "train")[0]["label"]
    np.testing.assert_array_equal(label, mask(0, 1))


def test_every_split_of_a_job_is_opened_first(tmp_path):
    root = folder(tmp_path, [mask(0, 1)], splits=("train", "val"))
    config = parse(default())
    settings = {"data.name": "folder", "data.root": str(root), "eval.split": "val"}
    config = with_settings(config, settings | {"eval.calibrate_split": "train"})
    check_training_data(config.data)
    check_scored_splits(config.data, config.eval)
    with pytest.raises(UserError, match="folder has no split 'test'; legal: train, val"):
        check_scored_splits(config.data, with_settings(config, {"eval.split": "test"}).eval)
    with pytest.raises(UserError, match="no such file"):
        check_training_data(with_settings(config, {"data.root": str(tmp_path / "none")}).data)
    (root / "classes.txt").write_text("0: soil\n1: ignore\n")
    with pytest.raises(UserError, match="'soil' is the only class"):
        check_training_data(config.data)
    with pytest.raises(UserError, match="'soil' is the only class"):
        check_scored_splits(config.data, config.eval)


def test_a_relative_root_is_one_folder(tmp_path, monkeypatch):
    """PASCAL-Context joined it twice."""
    trees.pascal_context(tmp_path / "voc")
    monkeypatch.chdir(tmp_path)
    assert registry.open_source("pascal_context_59", "voc", "val")[0]["label"].ndim == 2
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(registry.open_source("pascal_context_59", "~/voc", "val"))


def test_camvid_as_segnet_gives_it(tmp_path):
    for split in ("train", "val", "test"):
        trees.image(tmp_path / "CamVid" / split / "a.png", H, W)
        trees.save(tmp_path / "CamVid" / f"{split}annot" / "a.png", mask(0, 11))
        label = registry.open_source("camvid", tmp_path, split)[0]["label"]
        np.testing.assert_array_equal(label, mask(0, -1))


def test_refuge_as_kaggle_packs_it(tmp_path):
    for split, stem in (("train", "g0001"), ("val", "V0001"), ("test", "T0001")):
        trees.image(tmp_path / split / "images" / f"{stem}.jpg", H, W)
        trees.save(tmp_path / split / "mask" / f"{stem}.bmp", mask(255, 128, 0))
        label = registry.open_source("refuge2", tmp_path, split)[0]["label"]
        np.testing.assert_array_equal(label, mask(0, 1, 2))


def test_a_synonym_means_what_the_mask_holds():
    """The rim is the disc without the cup; a blind window is no window blind."""
    assert "neuroretinal rim" not in registry.spec("refuge2").classes[1].synonyms
    coco = {c.name: c.synonyms for c in registry.spec("coco_stuff").classes}
    assert coco["window-blind"] == ("window blind",)
