# SPDX-License-Identifier: Apache-2.0
"""The check of a download: what it counts, what it finds, what it says, and how it ends."""

from __future__ import annotations

import codecs
import json
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import official_trees as trees
import pytest
from experiments import get_config
from official_trees import H, W, grid
from PIL import Image

from digseg_jax.config.parse import parse
from digseg_jax.data.datasets import registry
from digseg_jax.data.sources import check_scored_splits, check_training_data
from digseg_jax.errors import UserError
from digseg_jax.tools import check_data
from digseg_jax.tools.contact_sheet import Tile, contact_sheet, palette
from digseg_jax.tools.prepare_data import prepare_split

CAMVID = Path(__file__).parents[3] / "shared" / "data" / "camvid"


def run(capsys, *arguments: object) -> tuple[int, str]:
    status = check_data.main([str(a) for a in arguments])
    return status, capsys.readouterr().out


@pytest.fixture
def root(tmp_path):
    trees.folder(tmp_path)
    for i in range(5):
        trees.image(tmp_path / f"images/val/b{i}.jpg")
        trees.save(tmp_path / f"masks/val/b{i}.png", grid(0))
    return tmp_path


def test_a_good_folder_passes_with_its_shares(root, capsys, tmp_path):
    sheet = tmp_path / "sheet.png"
    status, out = run(capsys, "--dataset=folder", "--root", root, "--json", "--sheet", sheet)
    found = json.loads(out)
    assert status == 0 and found["violations"] == []
    val = found["splits"]["val"]
    assert val["count"] == val["read"] == 6 and val["official_count"] is None
    pixels = 6 * H * W
    assert val["pixel_share"]["road"] == pytest.approx((H * W - 2) / pixels)
    assert val["ignored_share"] == pytest.approx(1 / pixels)
    assert val["images_with_class"] == {"background": 6, "road": 1}
    with Image.open(sheet) as picture:
        assert picture.width > 1000
    status, out = run(capsys, "--dataset=folder", "--root", root, "--sheet=-")
    assert status == 0 and "nothing is wrong" in out and "val: 6 examples" in out


@pytest.mark.parametrize(
    ("kind", "spoil", "word"),
    [
        ("unreadable", lambda p: p.write_bytes(p.read_bytes()[:30]), "unreadable"),
        ("size_mismatch", lambda p: trees.save(p, np.zeros((9, 9))), "9x9"),
        ("unknown_value", lambda p: trees.save(p, grid(0, 77)), "label value 77"),
    ],
)
def test_what_is_wrong_is_counted_told_and_ends_with_1(root, capsys, kind, spoil, word):
    for i in (1, 3):
        spoil(root / f"masks/val/b{i}.png")
    status, out = run(capsys, "--dataset=folder", "--root", root, "--json", "--sheet=-")
    val = json.loads(out)["splits"]["val"]
    assert status == 1 and val[f"{kind}_files"] == 2 and "b1.png" in val["errors"][kind][0]
    assert sum(val["images_with_class"].values()) == 5  # the three good ones; a.png has two classes
    status, out = run(capsys, "--dataset=folder", "--root", root, "--sheet=-")
    assert status == 1 and "WRONG" in out and word in out and "b1.png" in out


def test_counts_are_held_against_the_official_ones(tmp_path, capsys):
    trees.ade20k(tmp_path)
    status, out = run(capsys, "--dataset=ade20k", "--root", tmp_path, "--split=val", "--sheet=-")
    assert status == 1 and "1 examples, officially 2000" in out


def test_a_subset_by_its_own_list_is_a_note(tmp_path, capsys):
    """All that is listed is there: a run on it is neither pointless nor wrong."""
    trees.pascal_voc(tmp_path)
    lists = tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation"
    marked = codecs.BOM_UTF8 + (lists / "val.txt").read_bytes()
    (lists / "val.txt").write_bytes(marked)  # as editors on Windows save it
    arguments = ("--dataset=pascal_voc", "--root", tmp_path, "--split=val", "--sheet=-")
    status, out = run(capsys, *arguments, "--json")
    found = json.loads(out)
    val = found["splits"]["val"]
    assert val["subset"] and f"names {val['count']} of the official 1449 examples" in val["notes"][0]
    assert status == 0 and found["violations"] == []


def test_a_split_that_is_not_there_is_wrong_unless_it_is_an_extra_one(tmp_path, capsys):
    trees.pascal_voc(tmp_path)
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").unlink()
    _, out = run(capsys, "--dataset=pascal_voc", "--root", tmp_path, "--json", "--sheet=-")
    found = json.loads(out)
    assert "val.txt" in found["splits"]["val"]["error"] and "trainaug" not in found["splits"]
    assert any(v.startswith("val: ") for v in found["violations"])


def what_a_run_says(root: Path) -> str:
    """The refusal with which a run of the shipped recipe begins on a folder; "" if it begins."""
    config = get_config("folder", "small")
    config.data.root = str(root)
    config = parse(config)
    try:
        check_training_data(config.data)
        check_scored_splits(config.data, config.eval)
    except UserError as error:
        return str(error)
    return ""


def without_val(root: Path) -> None:
    for kind in ("images", "masks"):
        shutil.rmtree(root / kind / "val")


def only_train_is_empty(root: Path) -> None:
    for kind in ("images", "masks"):
        shutil.rmtree(root / kind / "train")
        (root / kind / "train").mkdir()


def one_class(root: Path) -> None:
    (root / "classes.txt").write_text("0: background\n1: ignore\n")


def old_shards(root: Path) -> None:
    prepare(root)
    mask = root / "masks" / "val" / "a.png"
    os.utime(mask, (0, (root / "val" / "manifest.json").stat().st_mtime + 60))


def other_values(root: Path) -> None:
    prepare(root)
    (root / "classes.txt").write_text("1: background\n0: road\n")


def shards_of_train(root: Path) -> None:
    prepare(root)
    shutil.rmtree(root / "val")


def prepare(root: Path) -> None:
    for split in ("train", "val"):
        opened = partial(registry.open_source, "folder", root, split)
        prepare_split(opened, registry.spec("folder", root), split, root)


def other_words(root: Path) -> None:
    prepare(root)
    lines = (root / "classes.txt").read_text().splitlines()
    (root / "classes.txt").write_text("\n".join([*lines[:-1], f"{lines[-1]}, another word"]) + "\n")


def an_unlabeled_image_beside_old_shards(root: Path) -> None:
    """The shards can no longer be compared with the files: they may be old."""
    old_shards(root)
    shutil.copy(root / "images/val/a.jpg", root / "images/val/unlabeled.jpg")


def without_a_mask(root: Path) -> None:
    (root / "masks/train/a.png").unlink()


@pytest.mark.parametrize(
    "spoil",
    [
        without_val, only_train_is_empty, one_class, old_shards, other_values, shards_of_train,
        without_a_mask, other_words, an_unlabeled_image_beside_old_shards,
    ],
)  # fmt: skip
def test_what_a_run_refuses_at_its_start_is_wrong_here_in_the_same_words(root, capsys, spoil):
    assert what_a_run_says(root) == ""
    assert run(capsys, "--dataset=folder", "--root", root, "--sheet=-")[0] == 0
    spoil(root)
    refused = what_a_run_says(root)
    status, out = run(capsys, "--dataset=folder", "--root", root, "--sheet=-")
    assert status == 1 and refused
    assert refused.removeprefix("folder: ") in out


def test_images_of_two_splits_are_told(root, capsys):
    for kind, end in (("images", "jpg"), ("masks", "png")):
        shutil.copy(root / f"{kind}/train/a.{end}", root / f"{kind}/val/other.{end}")
    status, out = run(capsys, "--dataset=folder", "--root", root, "--sheet=-")
    assert status == 0 and "train has 7 of these images as well, such as " in out


def test_shards_alone_are_checked_as_they_are_read(root, capsys):
    prepare(root)
    for kind in ("images", "masks"):
        shutil.rmtree(root / kind)
    (root / "classes.txt").unlink()
    (root / "run").mkdir()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(root / "run/gallery.png")  # of a run there
    status, out = run(capsys, "--dataset=folder", "--root", root, "--sheet=-")
    assert what_a_run_says(root) == ""
    assert status == 0 and "val: 6 examples, 6 read" in out


def test_without_a_val_the_test_split_is_scored_on_request(root, capsys):
    for kind in ("images", "masks"):
        (root / kind / "val").rename(root / kind / "test")
    status, out = run(capsys, "--dataset=folder", "--root", root, "--sheet=-")
    assert status == 0 and "no val: have this split scored by --config.eval.split=test" in out


def test_a_limit_reads_a_spread_of_examples_and_counts_all(root, capsys):
    (root / "masks/val/b2.png").write_bytes(b"")
    _, out = run(capsys, "--dataset=folder", "--root", root, "--json", "--sheet=-", "--limit=2")
    val = json.loads(out)["splits"]["val"]
    assert val["read"] == 2 and val["count"] == 6 and val["unreadable_files"] == 0


def test_what_cannot_be_checked_ends_with_2(tmp_path, capsys):
    assert check_data.main(["--dataset=citiscapes", f"--root={tmp_path}"]) == 2
    assert "did you mean 'cityscapes'" in capsys.readouterr().err
    trees.folder(tmp_path)
    for option, told in (
        (f"--sheet={tmp_path}/none/a.png", "no such folder"),
        (f"--sheet={tmp_path}/sheet", "must end in .png"),
        ("--limit=-1", "at least 0"),
    ):
        assert check_data.main(["--dataset=folder", f"--root={tmp_path}", option]) == 2
        assert told in capsys.readouterr().err


def test_a_sheet_that_cannot_be_written_takes_nothing_away(root, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(check_data.os, "access", lambda place, mode: False)
        assert run(capsys, "--dataset=folder", "--root", root, f"--sheet={root}/a.png")[0] == 2

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(check_data, "contact_sheet", full)
    status, out = run(capsys, "--dataset=folder", "--root", root, f"--sheet={root}/a.png")
    assert status == 1 and "No space left" in out and "val: 6 examples, 6 read" in out


def test_the_sheet_shows_each_label_in_the_color_of_its_class(root):
    facts = registry.spec("camvid")
    label = np.repeat([[0, 3, -1]], 30, axis=0).repeat(10, axis=1)
    sheet = np.asarray(contact_sheet(facts, [Tile(np.zeros((30, 30, 3), np.uint8), label, "t")]))
    colors = palette(facts)
    for column, class_id in ((350, 0), (450, 3), (550, -1)):
        assert tuple(sheet[150, column]) == tuple(colors[class_id])
    assert (sheet[100, 100] == 0).all()  # the image


@pytest.mark.skipif(not CAMVID.is_dir(), reason="CamVid is not beside the checkout")
def test_camvid_is_as_it_should_be(capsys):
    arguments = ("--dataset=camvid", "--root", CAMVID, "--json", "--sheet=-", "--limit=20")
    status, out = run(capsys, *arguments)
    found = json.loads(out)["splits"]
    assert status == 0 and {s: f["count"] for s, f in found.items()} == {"train": 367, "val": 101}
    for findings in found.values():
        share = findings["pixel_share"]
        assert share["road"] > 0.2 and share["building"] > 0.15 and share["bicyclist"] < 0.05


def test_land_cover_is_as_it_should_be(cover):
    for name in ("landcover", "landcover_igbp"):
        facts = registry.spec(name)
        for split, count in facts.splits.items():
            assert len(registry.open_source(name, "", split)) == count
    source = registry.open_source("landcover_igbp", "", "val")
    example = source[0]
    assert example["image"].shape == (128, 128, 3) and example["label"].dtype == np.int32
    assert all(p.is_file() for p in source.files(0).values())
