# SPDX-License-Identifier: Apache-2.0
"""Every data set from a miniature of its official download, against labels worked out by hand."""

from __future__ import annotations

import logging
import pickle

import numpy as np
import official_trees as trees
import pytest
from official_trees import H, W, grid

from digseg_jax.data.datasets import registry
from digseg_jax.data.datasets.readers import deepglobe, monuseg, rle
from digseg_jax.errors import UserError

# by data set: the split for evaluation, and its first label, filled as `grid` does
LABELS = {
    "ade20k": ("val", grid(-1, 0, 149, -1, 89, 6)),
    "ade20k_847": ("val", grid(-1, 0, 1, -1, 0)),
    "bdd100k": ("val", grid(0, 18, -1, 7)),
    "camvid": ("val", grid(0, 10, -1, 3)),
    # labelIds 0..23, row by row: road is 7, sky 23, person 24
    "cityscapes": ("val", np.array([[-1, -1, -1, -1, -1, -1], [-1, 0, 1, -1, -1, 2],
                                    [3, 4, -1, -1, -1, 5], [-1, 6, 7, 8, 9, 10]])),
    # a gap in the ids moves all later ones down: 10 -> 10, 12 -> 11, 181 -> 170
    "coco_stuff": ("val", grid(0, 10, 11, 79, 80, 170, -1, -1)),
    "deepglobe": ("test", grid(0, 0, 1, 1, 0)),
    "folder": ("val", grid(0, 1, -1, 1)),
    "pascal_context_59": ("val", grid(-1, 0, -1, -1, -1, 49)),
    "pascal_context_459": ("val", grid(-1, 1, 255, 430, 458, 396)),
    "pascal_voc": ("val", grid(-1, 0, 19, -1, 14)),
    "pascal_voc_21": ("val", grid(0, 1, 20, -1, 15)),
    "phenobench": ("val", grid(0, 1, 2, 1, 2, 0)),
    "refuge2": ("test", grid(0, 1, 2, 1, 0)),
    # the triangle (0.5, 0.5), (3.5, 0.5), (0.5, 3.5): centers with x, y >= 0.5 and x + y <= 4
    "monuseg": ("test", np.array([[0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0],
                                  [0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]])),
}  # fmt: skip


@pytest.fixture
def short_lists(monkeypatch):
    """The miniature downloads hold one image of each explicit list."""
    short = {
        "deepglobe_test": ["388122"],
        "monuseg_train": ["TCGA-18-5592-01Z-00-DX1"],
        "monuseg_test": ["TCGA-2Z-A9J9-01A-01-TS1"],
    }
    for module in (deepglobe, monuseg):
        monkeypatch.setattr(module, "shipped_list", short.get)


def test_every_data_set_of_files_has_a_miniature():
    assert (
        LABELS.keys() == trees.TREES.keys() == set(registry.names()) - {"landcover", "landcover_igbp"}
    )


@pytest.mark.parametrize("name", LABELS)
def test_labels_by_hand(name, tmp_path, short_lists):
    trees.TREES[name](tmp_path)
    split, expected = LABELS[name]
    source = registry.open_source(name, tmp_path, split)
    assert len(source) == 1
    example = source[0]
    assert example["image"].shape == (H, W, 3) and example["image"].dtype == np.uint8
    assert example["label"].dtype == np.int32
    np.testing.assert_array_equal(example["label"], expected)
    assert set(source.files(0)) == {"image", "label"} and all(
        p.is_file() for p in source.files(0).values()
    )
    assert example["name"] in str(source.files(0)["image"])
    assert len(registry.open_source(name, tmp_path, "train")) == (2 if name == "refuge2" else 1)
    facts = registry.spec(name, tmp_path)
    assert example["label"].max() < facts.num_classes


@pytest.mark.parametrize("name", LABELS)
def test_sources_travel_to_worker_processes(name, tmp_path, short_lists):
    trees.TREES[name](tmp_path)
    source = registry.open_source(name, tmp_path, LABELS[name][0])
    twin = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(twin[0]["label"], source[0]["label"])


@pytest.mark.parametrize("name", LABELS)
def test_the_unpacked_folder_itself_may_be_named(name, tmp_path, short_lists):
    trees.TREES[name](tmp_path)
    inner = {"ade20k": "ADEChallengeData2016", "ade20k_847": "ADE20K_2021_17_01", "bdd100k": "bdd100k",
             "coco_stuff": "coco_stuff164k", "pascal_context_59": "VOCdevkit/VOC2010",
             "pascal_context_459": "VOCdevkit/VOC2010", "pascal_voc": "VOCdevkit/VOC2012",
             "pascal_voc_21": "VOCdevkit/VOC2012",
             "phenobench": "PhenoBench"}.get(name, ".")  # fmt: skip
    assert len(registry.open_source(name, tmp_path / inner, LABELS[name][0])) == 1


@pytest.mark.parametrize("name", LABELS)
def test_an_empty_folder_is_an_error_that_names_it(name, tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        registry.open_source(name, tmp_path, LABELS[name][0])


def test_a_wrong_name_or_split_is_answered_with_the_legal_ones(tmp_path):
    with pytest.raises(UserError, match="did you mean 'cityscapes'"):
        registry.open_source("cityscape", tmp_path, "val")
    with pytest.raises(UserError, match="no split 'test'; legal: train, val"):
        registry.open_source("cityscapes", tmp_path, "test")


class TestPascalContextJson:
    """PASCAL in Detail: run-length masks, painted in list order."""

    STEMS = (("2008_000002", "train"), ("2008_000003", "val"))

    @pytest.fixture
    def root(self, tmp_path):
        voc = tmp_path / "VOCdevkit/VOC2010"
        for stem, split in self.STEMS:
            trees.image(voc / "JPEGImages" / f"{stem}.jpg")
            trees.lines(voc / "ImageSets/Main" / f"{split}.txt", stem)
        left, top = np.zeros((H, W), int), np.zeros((H, W), int)
        left[:, :3], top[:2] = 1, 1
        counts = trees.rle_counts(top)
        masks = [
            ("2008_000003", 2, trees.rle_counts(left)),
            ("2008_000003", 18, trees.rle_text(counts)),
            ("2008_000002", 3, counts),
        ]
        trees.detail_json(voc / "trainval_merged.json", self.STEMS, masks)
        return tmp_path

    def test_the_later_mask_wins_and_uncovered_pixels_are_0(self, root):
        label = registry.open_source("pascal_context_59", root, "val")[0]["label"]
        expected = np.full((H, W), -1)
        expected[:, :3] = 0  # aeroplane, raw 2
        expected[:2] = 2  # bed, raw 18, painted over it
        np.testing.assert_array_equal(label, expected)
        label = registry.open_source("pascal_context_459", root, "val")[0]["label"]
        assert label[0, 0] == 17 and label[3, 0] == 1 and label[3, 5] == -1

    def test_the_phases_are_the_splits_of_its_own(self, root):
        for split, stem in (("val_5104", "2008_000003"), ("train_4996", "2008_000002")):
            source = registry.open_source("pascal_context_59", root, split)
            assert [source[i]["name"] for i in range(len(source))] == [stem]
        # raw 3 is none of the 59, and class 2 of the 459
        assert (registry.open_source("pascal_context_59", root, "train")[0]["label"] == -1).all()
        assert (registry.open_source("pascal_context_459", root, "train")[0]["label"][:2] == 2).all()

    def test_the_default_splits_are_the_files_own_where_it_lacks_images(self, root, caplog):
        """Three of VOC's images are in no annotation of the released file."""
        trees.image(root / "VOCdevkit/VOC2010/JPEGImages/2008_000009.jpg")
        listed = root / "VOCdevkit/VOC2010/ImageSets/Main/train.txt"
        listed.write_text(listed.read_text() + "\n2008_000009\n")
        with caplog.at_level(logging.INFO, "digseg_jax"):
            found = registry.open_source("pascal_context_59", root, "train")
        own = registry.open_source("pascal_context_59", root, "train_4996")
        assert found.pairs == own.pairs and len(own) == 1
        (line,) = [record.getMessage() for record in caplog.records]
        assert "train.txt: trainval_merged.json lacks 1 of its 2 images" in line
        assert found.listed_as == "train_4996"  # whose number of images is the official one
        listed.unlink()
        assert registry.open_source("pascal_context_59", root, "train").pairs == own.pairs

    def test_a_mask_of_another_size_is_refused(self, root):
        path = root / "VOCdevkit/VOC2010/trainval_merged.json"
        path.write_text(path.read_text().replace(f"[{H}, {W}]", "[90000000, 90000000]"))
        with pytest.raises(UserError, match="90000000x90000000"):
            registry.open_source("pascal_context_59", root, "val")[0]

    def test_mat_files_win_where_both_are_there(self, root):
        trees.mat(root / "VOCdevkit/VOC2010/trainval/2008_000003.mat", grid(9))
        assert (registry.open_source("pascal_context_59", root, "val")[0]["label"] == 1).all()


class TestRunLengths:
    def test_text_and_list_give_the_same_mask(self):
        rng = np.random.default_rng(0)
        for _ in range(50):
            mask = rng.random((13, 9)) < rng.random()
            counts = trees.rle_counts(mask)
            for form in (counts, trees.rle_text(counts)):
                np.testing.assert_array_equal(rle.decode(form, 13, 9), mask)

    def test_it_agrees_with_pycocotools(self):
        coco = pytest.importorskip("pycocotools.mask")
        rng = np.random.default_rng(1)
        for _ in range(50):
            mask = (rng.random((37, 21)) < rng.random()).astype(np.uint8)
            packed = coco.encode(np.asfortranarray(mask))["counts"].decode()
            np.testing.assert_array_equal(rle.decode(packed, 37, 21), mask)

    @pytest.mark.parametrize(
        "counts", [[3, 4], [-1, 8], [7, 2], "é", "0" * 5, "P", "oooooooooooooooo1"]
    )
    def test_broken_runs_are_refused(self, counts):
        with pytest.raises(ValueError):
            rle.decode(counts, 2, 4)


class TestAugmentedVoc:
    """trainaug: VOC's train labels, and SBD's for all others but VOC's val images."""

    @pytest.fixture
    def root(self, tmp_path):
        trees.pascal_voc(tmp_path)
        for stem in ("2008_000008", "2008_000015"):
            trees.image(tmp_path / "VOCdevkit/VOC2012/JPEGImages" / f"{stem}.jpg")
        return tmp_path

    def stems(self, root):
        source = registry.open_source("pascal_voc", root, "trainaug")
        return {source[i]["name"]: source[i]["label"] for i in range(len(source))}

    def test_from_the_release_of_sbd(self, root):
        import scipy.io

        release = root / "benchmark_RELEASE/dataset"
        trees.lines(release / "train.txt", "2008_000008", "2007_000032")
        trees.lines(release / "val.txt", "2008_000015", "2007_000033")
        (release / "cls").mkdir()
        for stem in ("2008_000008", "2008_000015", "2007_000032", "2007_000033"):
            label = grid(0, 3, 20).astype(np.uint8)
            struct = {"Segmentation": label, "Boundaries": np.zeros((20, 1))}
            scipy.io.savemat(release / "cls" / f"{stem}.mat", {"GTcls": struct})
        found = self.stems(root)
        assert sorted(found) == ["2007_000032", "2008_000008", "2008_000015"]
        np.testing.assert_array_equal(found["2008_000008"], grid(-1, 2, 19))
        np.testing.assert_array_equal(found["2007_000032"], LABELS["pascal_voc"][1])  # VOC's own

    def test_from_the_folder_that_others_made(self, root):
        for stem in ("2008_000008", "2007_000033"):
            trees.save(root / "VOCdevkit/VOC2012/SegmentationClassAug" / f"{stem}.png", grid(0, 3))
        assert sorted(self.stems(root)) == ["2007_000032", "2008_000008"]

    def test_without_either_it_says_what_is_missing(self, root):
        with pytest.raises(UserError, match="benchmark_RELEASE"):
            registry.open_source("pascal_voc", root, "trainaug")


class TestFolder:
    """A user's own data."""

    def label(self, root, *lines, mask=None):
        trees.folder(root)
        trees.lines(root / "classes.txt", *lines)
        if mask is not None:
            mask(root / "masks/val/a.png")
        return registry.open_source("folder", root, "val")[0]["label"]

    def test_values_and_synonyms(self, tmp_path):
        def mask(path):
            trees.save(path, grid(7, 300, 9, 12), np.uint16)

        lines = ("7: soil", "300: road, street", "12: tree", "9: ignore")
        np.testing.assert_array_equal(self.label(tmp_path, *lines, mask=mask), grid(0, 1, -1, 2))
        facts = registry.spec("folder", tmp_path)
        assert facts.names == ("soil", "road", "tree") and facts.classes[1].synonyms == ("street",)
        assert list(facts.splits) == ["train", "val"]

    @pytest.mark.parametrize("suffix", ["tif", "bmp"])
    def test_other_lossless_formats(self, tmp_path, suffix):
        trees.folder(tmp_path)
        (tmp_path / "masks/val/a.png").unlink()
        trees.save(tmp_path / f"masks/val/a.{suffix}", grid(1, 0))
        label = registry.open_source("folder", tmp_path, "val")[0]["label"]
        np.testing.assert_array_equal(label, grid(1, 0))

    def test_colors(self, tmp_path):
        from PIL import Image

        colors = np.array([[0, 0, 0], [255, 0, 16], [8, 8, 8]], np.uint8)

        def mask(path):
            Image.fromarray(colors[grid(1, 0, 2, 1)]).save(path)

        lines = ("#000000: soil", "#ff0010: car", "#080808: ignore")
        np.testing.assert_array_equal(self.label(tmp_path, *lines, mask=mask), grid(1, 0, -1, 1))
        with pytest.raises(UserError, match="#080808 at row 0, column 2"):
            self.label(tmp_path, *lines[:2], mask=mask)

    def test_255_may_be_a_class(self, tmp_path):
        label = self.label(tmp_path, "0: soil", "1: plant", "255: sky")
        np.testing.assert_array_equal(label, grid(0, 1, 2, 1))

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (("a: b: c",), "classes.txt:1"),
            (("0: a", "b"), "use one form for all lines"),
            (("0: a", "0: b"), "line 1's already"),
            (("a", "b, a"), "'a' is named twice"),
            (("0: ignore",), "names no class"),
            (("0: a,,b",), "classes.txt:1"),
        ],
    )
    def test_a_bad_list_is_told_by_line(self, tmp_path, lines, message):
        with pytest.raises(UserError, match=message):
            self.label(tmp_path, *lines)

    def test_without_a_list_it_says_so(self, tmp_path):
        with pytest.raises(UserError, match="classes.txt"):
            registry.spec("folder", tmp_path)


def test_the_older_release_of_bdd100k(tmp_path):
    trees.image(tmp_path / "seg/images/val/7d06fefd.jpg")
    trees.save(tmp_path / "seg/labels/val/7d06fefd_train_id.png", grid(4, 255))
    trees.image(tmp_path / "seg/color_labels/val/7d06fefd_train_color.png")
    for root in (tmp_path, tmp_path / "seg"):
        source = registry.open_source("bdd100k", root, "val")
        np.testing.assert_array_equal(source[0]["label"], grid(4, -1))


@pytest.mark.parametrize("labels", ["stuffthingmaps", "."])
def test_coco_as_its_archives_unpack(tmp_path, labels):
    trees.image(tmp_path / "val2017/000000000139.jpg")
    trees.save(tmp_path / labels / "val2017/000000000139.png", grid(181))
    assert (registry.open_source("coco_stuff", tmp_path, "val")[0]["label"] == 170).all()


def test_monuseg_has_the_challenge_training_set_and_all_of_it(tmp_path, short_lists):
    trees.monuseg(tmp_path)
    trees.image(tmp_path / "MoNuSeg 2018 Training Data/Tissue Images/TCGA-F9-A8NY-01Z-00-DX1.tif")
    trees.aperio(tmp_path / "MoNuSeg 2018 Training Data/Annotations/TCGA-F9-A8NY-01Z-00-DX1.xml",
                 [[(0, 0), (2, 0), (0, 2)]])  # fmt: skip
    assert len(registry.open_source("monuseg", tmp_path, "train")) == 1
    assert len(registry.open_source("monuseg", tmp_path, "train_37")) == 2


def test_run_lengths_are_written_as_an_independent_encoder_writes_them():
    rng = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 1.0):
        mask = rng.random((37, 41)) < share
        mask[5:30, 3:20] |= share > 0
        assert rle.encode(mask) == trees.rle_text(trees.rle_counts(mask))
        np.testing.assert_array_equal(rle.decode(rle.encode(mask), 37, 41), mask)
