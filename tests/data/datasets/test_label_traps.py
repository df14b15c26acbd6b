# SPDX-License-Identifier: Apache-2.0
"""The ways in which labels of the public data sets are read wrongly without anybody noticing.

Each test says what the careless reader does; it fails if ours did the same.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import official_trees as trees
import pytest
from official_trees import H, W, grid
from PIL import Image

from digseg_jax.data.datasets import registry
from digseg_jax.data.datasets.decode import LabelTable, LabelValueError, SizeError
from digseg_jax.data.datasets.readers import deepglobe, monuseg, polygons
from digseg_jax.data.datasets.readers.ade20k_full import short_side_size
from digseg_jax.errors import UserError
from digseg_jax.io.files import UnreadableError


def names(name: str) -> tuple[str, ...]:
    return registry.spec(name).names


def first(name: str, root, split: str = "val") -> dict:
    return registry.open_source(name, root, split)[0]


def test_255_is_a_class_where_there_are_more_than_255(tmp_path):
    """Careless: 255 is ignored everywhere; 'pier' and 'monkey' are never learnt nor scored."""
    trees.ade20k_847(tmp_path)
    pier = registry.spec("ade20k_847").classes[255]
    assert pier.name.startswith("pier")
    for file in tmp_path.rglob("ADE_val*_seg.png"):
        trees.seg_png(file, grid(pier.raw[0], 0))
    np.testing.assert_array_equal(first("ade20k_847", tmp_path)["label"], grid(255, -1))

    trees.pascal_context(tmp_path)
    assert names("pascal_context_459")[255] == "monkey"
    assert (first("pascal_context_459", tmp_path)["label"] == 255).sum() == 1


def test_255_is_road_in_deepglobe_and_background_in_refuge(tmp_path, monkeypatch):
    """Careless: a generic step makes 255 'ignore' before the reader sees it."""
    monkeypatch.setattr(deepglobe, "shipped_list", lambda _: ["388122"])
    trees.deepglobe(tmp_path / "roads")
    road = first("deepglobe", tmp_path / "roads", "test")["label"]
    assert road[0, 3] == names("deepglobe").index("road") and (road >= 0).all()
    trees.refuge2(tmp_path / "eyes")
    eye = first("refuge2", tmp_path / "eyes", "val")["label"]
    assert eye[0, 0] == names("refuge2").index("background") and (eye >= 0).all()


def test_ade_ignores_0_and_a_raw_255(tmp_path):
    """Careless: uint8 minus 1 makes 254 of a raw 255, and 255 of 0."""
    trees.ade20k(tmp_path)
    label = first("ade20k", tmp_path)["label"]
    assert label[0, 0] == label[0, 3] == -1 and label[0, 2] == 149


def test_ade_names_are_whole_and_clean():
    """Careless: the CSV splits names into words, and others' lists carry a trailing blank."""
    ade = registry.spec("ade20k").classes
    assert ade[7].name == "bed" and "screen door" in [n for c in ade for n in (c.name, *c.synonyms)]
    for name in set(registry.names()) - {"folder"}:
        words = [w for c in registry.spec(name).classes for w in (c.name, *c.synonyms)]
        assert all(w == w.strip() and w and "  " not in w for w in words), name


def test_ade_colors_cannot_be_decoded_and_are_not_used_to_show_classes():
    """Careless: road and skyscraper have one color."""
    from digseg_jax.tools.contact_sheet import palette

    ade = registry.spec("ade20k")
    assert ade.classes[6].color == ade.classes[48].color == (140, 140, 140)
    for name in ("ade20k", "camvid", "cityscapes", "monuseg"):
        colors = palette(registry.spec(name))
        assert len({tuple(c) for c in colors.tolist()}) == registry.spec(name).num_classes + 1, name


def test_full_ade_is_resized_as_its_benchmark_is(tmp_path):
    """Careless: scored at the original resolution, or rounded another way, it is another benchmark."""
    assert short_side_size(512, 700) == (512, 700) and short_side_size(400, 300) == (400, 300)
    assert short_side_size(1536, 2048) == (512, 683)
    assert short_side_size(1001, 700) == (732, 512)  # 732.16
    assert short_side_size(600, 600) == (512, 512)
    trees.ade20k_847(tmp_path)
    picture = next(tmp_path.rglob("ADE_val*.jpg"))
    trees.image(picture, 600, 901)
    objects = np.where(np.arange(901)[None] < 450, 2978, 312) * np.ones((600, 1), int)
    trees.seg_png(next(tmp_path.rglob("ADE_val*_seg.png")), objects)
    example = first("ade20k_847", tmp_path)
    assert example["image"].shape == (512, 769, 3) and example["label"].shape == (512, 769)
    assert set(np.unique(example["label"])) == {0, 1}  # nearest: no new classes between
    assert abs(int((example["label"][0] == 0).sum()) - 384) <= 1


def test_full_ade_code_is_ten_red_plus_green(tmp_path):
    """Careless: R * 256 + G, or uint8 arithmetic that wraps."""
    trees.ade20k_847(tmp_path)
    last = max(c.raw[0] for c in registry.spec("ade20k_847").classes)
    file = next(tmp_path.rglob("ADE_val*_seg.png"))
    trees.seg_png(file, grid(last, 1))
    class_id = [c.raw[0] for c in registry.spec("ade20k_847").classes].index(last)
    np.testing.assert_array_equal(first("ade20k_847", tmp_path)["label"], grid(class_id, -1))
    Image.fromarray(np.full((H, W, 3), 115, np.uint8)).save(file)  # no multiple of ten: interpolated
    with pytest.raises(LabelValueError, match="red is 115"):
        first("ade20k_847", tmp_path)


def test_the_older_full_ade_is_refused(tmp_path):
    """Careless: the release of 2016 has the same file names and other object numbers."""
    (tmp_path / "ADE20K_2016_07_26/images/training/a/abbey").mkdir(parents=True)
    with pytest.raises(UserError, match="2016"):
        registry.open_source("ade20k_847", tmp_path, "train")


def test_names_of_full_ade_tell_its_classes_apart():
    """Careless: by the first synonym, three classes are 'bag'; a shared synonym has two right masks."""
    for name in set(registry.names()) - {"folder"}:
        classes = registry.spec(name).classes
        words = [w.lower() for c in classes for w in {c.name, *c.synonyms}]
        assert len(words) == len(set(words)), name
    full = [c.full_name for c in registry.spec("ade20k_847").classes]
    assert len(set(full)) == 847 and sum(n.split(", ")[0] == "bag" for n in full) == 3


def test_pascal_context_59_is_in_the_order_of_the_raw_ids():
    """Careless: 59_labels.txt puts VOC's classes first; one order's list on the other's labels."""
    raw = [c.raw for c in registry.spec("pascal_context_59").classes]
    assert raw == sorted(raw) and len(raw) == 59
    assert names("pascal_context_59")[:4] == ("aeroplane", "bag", "bed", "bedclothes")


def test_pascal_context_59_leaves_background_out_and_calls_tables_tables(tmp_path):
    """Careless: 60 classes with background; 'diningtable' for every table."""
    trees.pascal_context(tmp_path)
    label = first("pascal_context_59", tmp_path)["label"]
    assert (label[0, [0, 2, 3, 4]] == -1).all()
    assert names("pascal_context_59")[label[0, 5]] == "table"


def test_pascal_context_459_does_not_wrap_0(tmp_path):
    """Careless: 0 - 1 in uint16 is 65535, an index far outside."""
    trees.pascal_context(tmp_path)
    label = first("pascal_context_459", tmp_path)["label"]
    assert label[0, 0] == -1 and label.min() == -1 and label.max() < 459


def test_unknown_is_a_class_of_pascal_context_459(tmp_path):
    """Careless: the class called 'unknown' is taken for ignore."""
    trees.pascal_context(tmp_path)
    assert names("pascal_context_459")[430] == "unknown"
    assert first("pascal_context_459", tmp_path)["label"][0, 3] == 430


def test_voc_palette_files_are_read_by_index(tmp_path):
    """Careless: convert('L') makes luminances of indices, OpenCV gives colors."""
    trees.pascal_voc(tmp_path)
    file = next(tmp_path.rglob("SegmentationClass/2007_000033.png"))
    with Image.open(file) as opened:
        assert opened.mode == "P"
        assert np.asarray(opened.convert("L"))[0, 1] != 1  # the trap is there
    np.testing.assert_array_equal(first("pascal_voc", tmp_path)["label"], grid(-1, 0, 19, -1, 14))


def test_coco_png_values_are_one_less_than_the_ids_of_its_json(tmp_path):
    """Careless: labels.txt is 1-based, the PNGs 0-based; and eleven values are skipped."""
    stuff = registry.spec("coco_stuff")
    assert stuff.classes[0].name == "person" and stuff.classes[0].raw == (0,)
    assert stuff.classes[79].raw == (89,) and stuff.classes[80].raw == (91,)
    assert stuff.classes[170].raw == (181,)
    gaps = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
    assert set(stuff.ignored_raw) == gaps | {255}


def test_coco_values_are_mapped_once():
    """Careless: in one buffer, 12 -> 11 and then 11 -> ignore."""
    table = LabelTable.of(registry.spec("coco_stuff"))
    raw = np.arange(182, dtype=np.uint8)[None]
    label = table(raw, Path("x"))[0]
    assert label[12] == 11 and label[13] == 12 and label[11] == -1
    assert sorted(label[label >= 0]) == list(range(171))
    with pytest.raises(LabelValueError, match="label value 200"):
        table(np.array([[200]], np.uint8), Path("x"))


def test_files_that_other_projects_generate_do_not_double_the_set(tmp_path):
    """Careless: a glob of *.png finds *_labelTrainIds.png too."""
    trees.coco_stuff(tmp_path)
    trees.cityscapes(tmp_path / "city")
    for source in (registry.open_source("coco_stuff", tmp_path, "val"),
                   registry.open_source("cityscapes", tmp_path / "city", "val")):  # fmt: skip
        assert len(source) == 1 and "rainIds" not in str(source.files(0)["label"])


def test_cityscapes_table_has_no_entry_at_minus_one(tmp_path):
    """Careless: the license plate's id -1 overwrites the last entry of a lookup table."""
    trees.cityscapes(tmp_path)
    city = registry.spec("cityscapes")
    table = LabelTable.of(city)
    assert len(table.lookup) == 34 and table.lookup[33] == names("cityscapes").index("bicycle")
    assert all(v >= 0 for c in city.classes for v in c.raw)
    for value in (34, 255):
        with pytest.raises(LabelValueError, match=f"label value {value}"):
            table(np.array([[value]], np.uint8), Path("x"))
    with pytest.raises(LabelValueError, match="label value -1"):
        table(np.array([[-1]], np.int32), Path("x"))


def test_bdd_masks_hold_train_ids_already(tmp_path):
    """Careless: the Cityscapes table or the panoptic list is applied once more."""
    trees.bdd100k(tmp_path)
    np.testing.assert_array_equal(first("bdd100k", tmp_path)["label"], grid(0, 18, -1, 7))
    assert names("bdd100k") == names("cityscapes")


def test_bdd_wall_and_fence_have_their_own_colors():
    """Careless: the tool's configuration file swaps the two."""
    colors = {c.name: c.color for c in registry.spec("bdd100k").classes}
    assert colors["wall"] == (102, 102, 156) and colors["fence"] == (190, 153, 153)


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_deepglobe_masks_are_cut_at_128_in_any_mode(tmp_path, monkeypatch, mode):
    """Careless: == 255, or > 0; the values are not pure, and some files have three channels."""
    monkeypatch.setattr(deepglobe, "shipped_list", lambda _: ["388122"])
    trees.deepglobe(tmp_path)
    file = tmp_path / "train/388122_mask.png"
    Image.fromarray(grid(0, 127, 128, 255, 3).astype(np.uint8)).convert(mode).save(file)
    label = first("deepglobe", tmp_path, "test")["label"]
    np.testing.assert_array_equal(label, grid(0, 0, 1, 1, 0))
    trees.save(file, grid(1, 0))  # coded 0 and 1: all of it would be background
    with pytest.raises(LabelValueError, match="0 and 1 only"):
        first("deepglobe", tmp_path, "test")


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "reversed palette"])
def test_refuge_is_inverted_and_its_palette_is_looked_up(tmp_path, mode):
    """Careless: 0 is background; or a palette file's indices are taken for gray values."""
    trees.refuge2(tmp_path)
    file = next(tmp_path.rglob("V0001.bmp"))
    gray = Image.fromarray(grid(255, 128, 0, 128, 255).astype(np.uint8))
    if mode == "reversed palette":
        gray = Image.fromarray(255 - np.asarray(gray))
        gray.putpalette([v for v in range(255, -1, -1) for _ in range(3)])
    else:
        gray = gray.convert(mode)
    gray.save(file)
    label = first("refuge2", tmp_path)["label"]
    np.testing.assert_array_equal(label, grid(0, 1, 2, 1, 0))
    for wrong in (grid(0, 60), grid(0)):  # a value between, and no background at all
        trees.save(file, wrong)
        with pytest.raises(LabelValueError):
            first("refuge2", tmp_path)


def test_the_disc_of_refuge_contains_the_cup():
    """Careless: Dice of the rim is reported as Dice of the disc."""
    eyes = registry.spec("refuge2")
    disc, cup = eyes.names.index("optic disc"), eyes.names.index("optic cup")
    assert set(eyes.covers(disc)) == {disc, cup} and eyes.covers(cup) == (cup,)
    assert eyes.metric == "region_dice"


def test_refuge_is_found_by_name_without_illustrations(tmp_path):
    """Careless: a fixed depth, or every .jpg and .bmp there is."""
    trees.refuge2(tmp_path)
    found = {s: [p.name for p in registry.open_source("refuge2", tmp_path, s).pairs]
             for s in ("train", "val", "test")}  # fmt: skip
    assert found == {"train": ["g0001", "n0001"], "val": ["V0001"], "test": ["T0001"]}
    trees.image(tmp_path / "copy/V0001.jpg")
    with pytest.raises(UserError, match="V0001.jpg and copy/V0001.jpg; keep one"):
        registry.open_source("refuge2", tmp_path, "val")


@pytest.mark.parametrize(
    "names", [("Validation/Images", "Test/refuge2-test"), ("Refuge2-Validation", "Refuge2-Test")]
)
def test_refuge_of_2020_from_its_top_folder(tmp_path, names):
    """It holds the images of 2018 and, under the same names, 800 others without masks of the cup."""
    if "/" in names[0]:
        places = {
            "Train/REFUGE1-train": ("Training400/Glaucoma", "Disc_Cup_Masks/Glaucoma", "g0001"),
            "Train/REFUGE1-val": ("REFUGE-Validation400", "Disc_Cup_Masks", "V0001"),
            "Train/REFUGE1-test": ("Test400", "Disc_Cup_Masks/G", "T0001"),
        }
    else:
        places = {
            "": ("Training400/Glaucoma", "Annotation-Training400/Disc_Cup_Masks/Glaucoma", "g0001"),
            ".": ("REFUGE-Validation400", "REFUGE-Validation400-GT/Disc_Cup_Masks", "V0001"),
            "./": ("Test400", "REFUGE-Test-GT/Disc_Cup_Masks/G", "T0001"),
        }
    for top, (images, masks, stem) in places.items():
        trees.image(tmp_path / top / images / f"{stem}.jpg")
        trees.save(tmp_path / top / masks / f"{stem}.bmp", grid(255, 128, 0, 128, 255))
    for folder, stem in zip(names, ("V0001", "T0001"), strict=True):
        trees.image(tmp_path / folder / f"{stem}.jpg")
        trees.save(tmp_path / folder / "../Disc_Masks" / f"{stem}.png", grid(255, 0))

    for split, stem in (("train", "g0001"), ("val", "V0001"), ("test", "T0001")):
        (pair,) = registry.open_source("refuge2", tmp_path, split).pairs
        assert pair.name == stem and "400" in pair.image


class TestNuclei:
    """Careless: another tool's polygons; only the first layer; regions that are no areas."""

    def mask(self, *polygon_list, shape=(6, 8)):
        mask = np.zeros(shape, bool)
        for points in polygon_list:
            polygons.fill(mask, np.array(points, float))
        return mask.astype(int).tolist()

    def test_a_pixel_belongs_if_its_centre_does_also_on_the_border(self):
        assert self.mask([(1, 1), (4, 1), (4, 3), (1, 3)]) == [
            [0, 0, 0, 0, 0, 0, 0, 0],
            [0, 1, 1, 1, 1, 0, 0, 0],
            [0, 1, 1, 1, 1, 0, 0, 0],
            [0, 1, 1, 1, 1, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 0, 0],
        ]
        assert self.mask([(0.6, 0.6), (3.4, 0.6), (3.4, 2.4), (0.6, 2.4)]) == [
            [0, 0, 0, 0, 0, 0, 0, 0],
            [0, 1, 1, 1, 0, 0, 0, 0],
            [0, 1, 1, 1, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 0, 0],
        ]

    def test_overlapping_regions_unite_and_borders_cut(self):
        here = self.mask(
            [(-3, -3), (1.5, -3), (1.5, 1.5), (-3, 1.5)], [(1, 1), (2.2, 1), (2.2, 2.2), (1, 2.2)]
        )
        assert here[:3] == [
            [1, 1, 0, 0, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0, 0, 0],
            [0, 1, 1, 0, 0, 0, 0, 0],
        ]
        assert sum(map(sum, here[3:])) == 0
        assert self.mask([(6.5, 4.5), (90, 4.5), (90, 90), (6.5, 90)])[5] == [0, 0, 0, 0, 0, 0, 0, 1]
        assert sum(map(sum, self.mask([(100, 100), (110, 100), (100, 110)]))) == 0

    def test_every_layer_counts_and_two_points_are_no_region(self, tmp_path):
        square = [(0.5, 0.5), (2.5, 0.5), (2.5, 2.5), (0.5, 2.5)]
        file = trees.aperio(tmp_path / "a.xml", [square, [(0, 5), (7, 5)]],
                            [[(x + 4, y) for x, y in square]])  # fmt: skip
        label = monuseg.NucleusLabels()(file, (6, 8))
        assert label.sum() == 8 and label[1:3, 1:3].all() and label[1:3, 5:7].all()

    def test_it_agrees_with_skimage(self):
        draw = pytest.importorskip("skimage.draw")
        rng = np.random.default_rng(0)
        for _ in range(300):
            angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 30))))
            radius = rng.uniform(1, 14, angles.size)
            points = 20 + np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=-1)
            ours, theirs = np.zeros((40, 40), bool), np.zeros((40, 40), bool)
            polygons.fill(ours, points)
            rows, columns = draw.polygon(points[:, 1], points[:, 0], theirs.shape)
            theirs[rows, columns] = True
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_phenobench_merges_partial_plants_at_either_depth(tmp_path, dtype):
    """Careless: 16-bit files cut to 8 bits or scaled; partial plants as classes of their own."""
    trees.phenobench(tmp_path)
    file = next((tmp_path / "PhenoBench/val/semantics").iterdir())
    trees.save(file, grid(0, 1, 2, 3, 4, 0), dtype)
    np.testing.assert_array_equal(first("phenobench", tmp_path)["label"], grid(0, 1, 2, 1, 2, 0))
    trees.save(file, grid(0, 256), np.uint16)  # soil, if only the low byte is looked at
    with pytest.raises(LabelValueError, match="label value 256"):
        first("phenobench", tmp_path)


def test_files_are_paired_by_name_and_a_missing_partner_is_an_error(tmp_path):
    """Careless: two sorted lists zipped, or the intersection taken in silence."""
    trees.camvid(tmp_path)
    trees.image(tmp_path / "images/val/0000.jpg")
    with pytest.raises(UserError, match="1 files without a label, the first is .*0000.jpg"):
        registry.open_source("camvid", tmp_path, "val")
    trees.save(tmp_path / "annotations/val/zzzz.png", grid(0))
    (tmp_path / "images/val/0000.jpg").unlink()
    with pytest.raises(UserError, match="without an image, the first is .*zzzz.png"):
        registry.open_source("camvid", tmp_path, "val")


def test_a_label_of_another_size_is_an_error(tmp_path):
    """Careless: resized until it fits."""
    trees.camvid(tmp_path)
    trees.save(tmp_path / "annotations/val/0001TP_006690.png", np.zeros((H, W + 1)))
    with pytest.raises(SizeError, match="label is 7x4 .* image 6x4"):
        first("camvid", tmp_path)


class TestExif:
    """Careless: the image is turned as EXIF says, and the mask is not; or the other way round."""

    def example(self, root, orientation, image_size, label_size, name="camvid"):
        trees.TREES[name](root)
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture, label = next(root.glob("images/val/*")), next(root.glob("*s/val/*.png"))
        trees.image(picture, *image_size, exif=exif, quality=100, subsampling=0)
        trees.save(label, np.zeros(label_size))
        return first(name, root)

    def test_masks_on_stored_pixels_keep_the_image_as_stored(self, tmp_path):
        assert self.example(tmp_path, 6, (8, 16), (8, 16))["image"].shape == (8, 16, 3)

    def test_masks_on_the_turned_image_turn_it(self, tmp_path):
        image = self.example(tmp_path, 6, (8, 16), (16, 8))["image"]
        assert image.shape == (16, 8, 3)
        stored = np.mgrid[:8, :16][0] * 9  # red grows downwards; 6 means: turn clockwise to see it
        assert np.abs(image[..., 0].astype(int) - np.rot90(stored, -1)).max() <= 4

    def test_half_a_turn_cannot_be_told(self, tmp_path):
        image = self.example(tmp_path / "a", 3, (8, 16), (8, 16))["image"]
        assert image[7, 0, 0] > image[0, 0, 0]  # as stored
        with pytest.raises(SizeError, match="orientation 3"):
            self.example(tmp_path / "b", 3, (8, 16), (8, 16), name="folder")


@pytest.mark.parametrize("mode", ["L", "CMYK", "1"])
def test_images_of_any_color_mode_come_as_rgb(tmp_path, mode):
    """Careless: gray JPEGs arrive with one channel, CMYK ones with four."""
    trees.camvid(tmp_path)
    picture = next(tmp_path.glob("images/val/*.jpg"))
    trees.image(picture, mode="L" if mode == "1" else mode)
    image = first("camvid", tmp_path)["image"]
    assert image.shape == (H, W, 3) and image.dtype == np.uint8
    if mode == "L":
        assert (image[..., 0] == image[..., 2]).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "1"])
def test_png_images_of_any_mode_come_as_rgb(tmp_path, mode):
    trees.camvid(tmp_path)
    next(tmp_path.glob("images/val/*.jpg")).unlink()
    picture = tmp_path / "images/val/0001TP_006690.png"
    if mode == "I;16":
        trees.save(picture, np.full((H, W), 0x8040), np.uint16)
    else:
        trees.image(picture, mode=mode)
    image = first("camvid", tmp_path)["image"]
    assert image.shape == (H, W, 3) and image.dtype == np.uint8
    if mode == "I;16":
        assert (image == 0x80).all()


def test_lossy_or_colored_label_files_are_refused(tmp_path):
    """Careless: a JPEG mask has classes that nobody drew; a color image is no index map."""
    trees.camvid(tmp_path)
    file = next(tmp_path.glob("annotations/val/*.png"))
    trees.image(tmp_path / "mask.jpg", mode="L")
    file.write_bytes((tmp_path / "mask.jpg").read_bytes())
    with pytest.raises(UnreadableError, match=str(file)):
        first("camvid", tmp_path)
    for mode in ("RGB", "RGBA"):
        trees.image(file, mode=mode)
        with pytest.raises(UnreadableError, match=f"mode {mode}"):
            first("camvid", tmp_path)
