# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile files: an error that names the file, never a crash, a hang or a wrong label."""

from __future__ import annotations

import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import official_trees as trees
import pytest
import scipy.io
from official_trees import H, W, grid
from PIL import Image

from digseg_jax.data.datasets import decode, registry
from digseg_jax.data.datasets.readers import monuseg
from digseg_jax.data.datasets.readers.matfile import read_mat
from digseg_jax.errors import UserError
from digseg_jax.io.files import MAX_BYTES, UnreadableError
from digseg_jax.io.image_file import read_image

LABEL = grid(0, 1, 2, 3, 10, 11, 5)


def png(label: np.ndarray, dtype=np.uint8, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(label.astype(dtype)).save(buffer, "PNG", **options)
    return buffer.getvalue()


def tiff(label: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(label.astype(np.uint16)).save(buffer, "TIFF", **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_size(width: int, height: int) -> bytes:
    """A well-formed PNG that declares any size, with little behind it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def read(path: Path) -> np.ndarray | None:
    """The label, or None for an error that names the file."""
    try:
        return decode.read_index_image(path)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return None


def palette_png(path: Path, indices: np.ndarray, palette: list[tuple[int, int, int]]) -> Path:
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette([value for color in palette for value in color])
    image.save(path)
    return path


@pytest.mark.parametrize(
    ("palette", "is_read"),
    [
        ([(0, 0, 0), (3, 3, 3)], False),  # values 0 and 3, renumbered by a tool
        ([(3, 3, 3), (0, 0, 0)], False),
        ([(i, i, i) for i in range(256)], True),
        ([(0, 0, 0), (255, 255, 255)], True),  # black and white for classes 0 and 1
        ([(0, 0, 0), (128, 0, 0), (3, 3, 3)], True),
    ],
)
def test_a_palette_of_grays_must_number_them_by_their_values(tmp_path, palette, is_read):
    indices = np.array([[0, 1], [1, 0]])
    path = palette_png(tmp_path / "a.png", indices, palette)
    if is_read:
        np.testing.assert_array_equal(decode.read_index_image(path), indices)
    else:
        with pytest.raises(UnreadableError, match="a palette of grays"):
            decode.read_index_image(path)


class TestDamage:
    """Whatever happens to the bytes of a label: the right label, or an error."""

    def test_a_png_cut_anywhere(self, tmp_path):
        data = png(LABEL)
        for length in range(len(data)):
            (tmp_path / "a.png").write_bytes(data[:length])
            assert read(tmp_path / "a.png") is None, length

    def test_a_png_with_any_flipped_bit(self, tmp_path):
        data = png(np.arange(200).reshape(10, 20), compress_level=0)
        rng, wrong = np.random.default_rng(0), 0
        for position in rng.choice(len(data) * 8, 300, replace=False):
            broken = bytearray(data)
            broken[position // 8] ^= 1 << (position % 8)
            (tmp_path / "a.png").write_bytes(bytes(broken))
            label = read(tmp_path / "a.png")
            wrong += label is not None and not np.array_equal(label, np.arange(200).reshape(10, 20))
        assert wrong == 0

    @pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about what it finds
    @pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
    def test_noise_and_cuts_of_every_format(self, tmp_path, suffix):
        rng = np.random.default_rng(1)
        path = tmp_path / f"a{suffix}"
        buffer = io.BytesIO()
        Image.fromarray(LABEL.astype(np.uint8)).save(buffer, {".tif": "TIFF"}.get(suffix, suffix[1:]))
        data = buffer.getvalue()
        for _ in range(60):
            path.write_bytes(data[: int(rng.integers(len(data) - H * W))] + rng.bytes(40))
            label = read(path)
            assert label is None or label.shape == LABEL.shape
        for length in range(0, len(data) - H * W, 7):  # the pixels are not all there
            path.write_bytes(data[:length])
            assert read(path) is None, length

    def test_nothing_at_all(self, tmp_path):
        for name, data in {"empty.png": b"", "zeros.png": bytes(5000), "text.png": b"no image"}.items():
            (tmp_path / name).write_bytes(data)
            assert read(tmp_path / name) is None
        assert read(tmp_path / "missing.png") is None
        (tmp_path / "folder.png").mkdir()
        assert read(tmp_path / "folder.png") is None

    def test_images_too(self, tmp_path):
        path = trees.image(tmp_path / "a.jpg", 64, 64)
        data = path.read_bytes()
        for length in range(0, len(data) // 2, 23):
            path.write_bytes(data[:length])
            with pytest.raises(UnreadableError, match="a.jpg"):
                read_image(path)

    def test_sixteen_bits_arrive_whole(self, tmp_path):
        label = grid(0, 255, 256, 65535, 300)
        for name, data in {"a.png": png(label, np.uint16), "a.tif": tiff(label),
                           "b.tif": tiff(label, compression="tiff_lzw")}.items():  # fmt: skip
            (tmp_path / name).write_bytes(data)
            np.testing.assert_array_equal(read(tmp_path / name), label)


class TestBombs:
    """Small files that would fill the memory or the time: refused before anything is unpacked."""

    @pytest.fixture(autouse=True)
    def quick(self):
        start = time.process_time()
        yield
        assert time.process_time() - start < 5

    @pytest.mark.parametrize(
        "size", [(30_000, 30_000), (65_535, 65_535), (2**31 - 1, 1), (1, 2**31 - 1)]
    )
    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    def test_huge_dimensions(self, tmp_path, size):
        (tmp_path / "a.png").write_bytes(png_of_size(*size))
        assert read(tmp_path / "a.png") is None
        with pytest.raises(UnreadableError, match=f"{size[0] * size[1]:,} pixels.*gdal_retile.py"):
            read_image(tmp_path / "a.png")

    def test_a_size_beyond_the_data(self, tmp_path):
        (tmp_path / "a.png").write_bytes(png_of_size(4000, 4000))
        assert read(tmp_path / "a.png") is None

    def test_a_file_beyond_the_limit(self, tmp_path):
        with (tmp_path / "a.png").open("wb") as file:
            file.truncate(MAX_BYTES + 1)  # sparse: takes no room
        assert read(tmp_path / "a.png") is None
        with pytest.raises(UnreadableError, match="bytes, more than.*gdal_retile.py"):
            read_image(tmp_path / "a.png")

    @pytest.mark.parametrize("sizes", [(80 * 2**20,), (64 * 2**20, 1000)], ids=["one", "two"])
    def test_a_mat_file_that_unpacks_to_much(self, tmp_path, sizes):
        """Two elements: the first takes all of the room, to the last byte."""
        packed = [zlib.compress(bytes(size), 1) for size in sizes]
        header = b"MATLAB 5.0".ljust(124) + b"\x00\x01IM"
        elements = b"".join(struct.pack("<II", 15, len(p)) + p for p in packed)
        (tmp_path / "a.mat").write_bytes(header + elements)
        with pytest.raises(UnreadableError, match="unpacks to more"):
            read_mat(tmp_path / "a.mat", "LabelMap")

    @pytest.mark.parametrize(
        "entities",
        [
            '<!DOCTYPE a [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>',
            '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]>',
            '<!DOCTYPE a SYSTEM "http://127.0.0.1:9/evil.dtd">',
        ],
    )
    def test_xml_with_entities(self, tmp_path, entities):
        (tmp_path / "a.xml").write_text(f"<?xml version='1.0'?>{entities}<Annotations/>")
        with pytest.raises(UnreadableError, match="document type"):
            monuseg.regions(tmp_path / "a.xml")


class TestXml:
    @pytest.mark.parametrize(
        "text",
        [
            "",
            "<Annotations>",
            "<Annotations/>",
            "plain",
            "<A><Vertex X='1' Y='2'/></A>",
            "<A><Region><Vertex X='1'/></Region></A>",
            "<A><Region><Vertex X='nan' Y='1'/></Region></A>",
            "<A><Region><Vertex X='1' Y='nan'/></Region></A>",
            "<A><Region><Vertex X='inf' Y='1'/></Region></A>",
            "<A><Region><Vertex X='1e300' Y='1'/></Region></A>",
            "<A><Region><Vertex X='one' Y='1'/></Region></A>",
        ],
    )
    def test_what_is_no_annotation_is_told(self, tmp_path, text):
        (tmp_path / "a.xml").write_text(text)
        with pytest.raises(UnreadableError, match="a.xml"):
            monuseg.regions(tmp_path / "a.xml")

    def test_an_annotation_cut_anywhere(self, tmp_path):
        path = trees.aperio(tmp_path / "a.xml", [[(0, 0), (3, 0), (0, 3)]])
        data = path.read_bytes()
        for length in range(len(data) - 1):
            path.write_bytes(data[:length])
            with pytest.raises(UnreadableError):
                monuseg.regions(path)


class TestMat:
    def test_a_file_cut_anywhere(self, tmp_path):
        for compress in (True, False):
            path = trees.mat(tmp_path / "a.mat", LABEL, compress=compress)
            data = path.read_bytes()
            for length in range(0, len(data) - 8, 3):
                path.write_bytes(data[:length])
                with pytest.raises(UnreadableError, match="a.mat"):
                    read_mat(path, "LabelMap")

    @pytest.mark.parametrize(
        "content",
        [
            {"Other": grid(1)},
            {"LabelMap": grid(1).astype(float)},
            {"LabelMap": np.zeros((2, 3, 4), np.uint16)},
            {"LabelMap": "text"},
            {"LabelMap": {"a": 1}},
        ],
    )
    def test_another_content(self, tmp_path, content):
        trees.pascal_context(tmp_path)
        scipy.io.savemat(tmp_path / "VOCdevkit/VOC2010/trainval/2008_000003.mat", content)
        with pytest.raises(UnreadableError, match="2008_000003.mat"):
            registry.open_source("pascal_context_459", tmp_path, "val")[0]


def test_a_damaged_json_is_told(tmp_path):
    voc = tmp_path / "VOCdevkit/VOC2010"
    trees.image(voc / "JPEGImages/2008_000003.jpg")
    trees.lines(voc / "ImageSets/Main/val.txt", "2008_000003")
    file = trees.detail_json(
        voc / "trainval_merged.json", [("2008_000003", "val")], [("2008_000003", 2, [H * W])]
    )
    data = file.read_bytes()
    assert len(registry.open_source("pascal_context_59", tmp_path, "val")) == 1
    for length in range(0, data.index(b"annos_occlusion") - 8, 11):
        file.write_bytes(data[:length])
        with pytest.raises(UserError, match="trainval_merged.json"):
            registry.open_source("pascal_context_59", tmp_path, "val")


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "..\\secret", ".hidden"])
def test_lists_cannot_name_files_elsewhere(tmp_path, name):
    trees.pascal_voc(tmp_path)
    trees.lines(tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt", name)
    with pytest.raises(UserError):
        registry.open_source("pascal_voc", tmp_path, "val")
    trees.pascal_context(tmp_path)
    voc = tmp_path / "VOCdevkit/VOC2010"
    images = [("2008_000003", "val")]
    trees.detail_json(voc / "trainval_merged.json", images, [])
    text = (voc / "trainval_merged.json").read_text().replace("2008_000003.jpg", name + ".jpg")
    (voc / "trainval_merged.json").write_text(text.replace("\\", "\\\\"))
    with pytest.raises(UserError):
        registry.open_source("pascal_context_59", tmp_path, "val_5104")


def test_a_label_that_is_a_pickle_is_never_loaded(tmp_path):
    """The index of full ADE20K is a pickle; whatever it holds, it is not opened."""
    trees.ade20k_847(tmp_path)
    bomb = tmp_path / "ADE20K_2021_17_01/index_ade20k.pkl"
    bomb.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR.")
    assert len(registry.open_source("ade20k_847", tmp_path, "val")) == 1
    assert not (tmp_path / "owned").exists()


LABEL_FILES = {  # by data set: the label file of its evaluation split
    "ade20k": "*/annotations/validation/*.png",
    "ade20k_847": "**/ADE_val*_seg.png",
    "bdd100k": "*/labels/sem_seg/masks/val/*.png",
    "camvid": "annotations/val/*.png",
    "cityscapes": "gtFine/val/*/*_labelIds.png",
    "coco_stuff": "*/annotations/val2017/0*9.png",
    "deepglobe": "train/388122_mask.png",
    "folder": "masks/val/*.png",
    "monuseg": "MoNuSegTestData/*.xml",
    "pascal_context_59": "**/trainval/2008_000003.mat",
    "pascal_context_459": "**/trainval/2008_000003.mat",
    "pascal_voc": "**/SegmentationClass/2007_000033.png",
    "pascal_voc_21": "**/SegmentationClass/2007_000033.png",
    "phenobench": "*/val/semantics/*.png",
    "refuge2": "REFUGE-Validation400-GT/**/*.bmp",
}


def damages(data: bytes, rng: np.random.Generator) -> dict[str, bytes]:
    """The bytes of a file after some accident; none of them is a label of the same size."""
    other, lossy, gray = io.BytesIO(), io.BytesIO(), io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (H, W, 4), np.uint8)).save(other, "PNG")
    Image.fromarray(rng.integers(0, 256, (H, W), np.uint8)).save(lossy, "JPEG")
    Image.fromarray(np.zeros((H + 1, W), np.uint8)).save(gray, "PNG")
    cuts = {f"cut at {n}": data[:n] for n in rng.integers(0, int(len(data) * 0.9), 30)}
    zeros = {f"zeros from {n}": data[:n] + bytes(len(data) - n) for n in rng.integers(0, 40, 5)}
    return cuts | zeros | {
        "nothing": b"",
        "mode": other.getvalue(),
        "JPEG": lossy.getvalue(),
        "size": gray.getvalue(),
        "noise": rng.bytes(len(data)),
        "huge": png_of_size(60_000, 60_000),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # Pillow's and scipy's, about what they find
@pytest.mark.parametrize("name", LABEL_FILES)
def test_any_accident_to_any_label_is_an_error_or_harmless(name, tmp_path, monkeypatch):
    from digseg_jax.data.datasets.readers import deepglobe

    short = {"deepglobe_test": ["388122"], "monuseg_test": ["TCGA-2Z-A9J9-01A-01-TS1"]}
    for module in (deepglobe, monuseg):
        monkeypatch.setattr(module, "shipped_list", short.get)
    trees.TREES[name](tmp_path)
    split = "test" if name in ("deepglobe", "monuseg") else "val"
    source = registry.open_source(name, tmp_path, split)
    expected = source[0]["label"]
    (file,) = tmp_path.glob(LABEL_FILES[name])
    assert file == source.files(0)["label"]
    data, errors = file.read_bytes(), 0
    for what, damaged in damages(data, np.random.default_rng(0)).items():
        if damaged == data:
            continue
        file.write_bytes(damaged)
        try:
            label = source[0]["label"]
        except UserError as error:
            assert str(file) in str(error) and "\n" not in str(error), what
            errors += 1
        else:
            np.testing.assert_array_equal(label, expected, err_msg=what)
    assert errors >= 30
