# SPDX-License-Identifier: Apache-2.0
"""Prediction on any image: sizes, color modes, windows, and what is told when it cannot work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from digseg_jax.data.datasets.landcover import GROUPS
from digseg_jax.data.datasets.readers.rle import decode
from digseg_jax.errors import UserError
from digseg_jax.prediction import job as predict_lib
from digseg_jax.prediction.files import (
    find_images,
    find_queries,
    overlay,
    query_colors,
    read_rgb,
    write_prediction,
)
from digseg_jax.prediction.job import predict
from digseg_jax.prediction.targets import targets
from digseg_jax.viz.colors import to_hex


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


class TestReadImage:
    """Everything comes out as RGB uint8 [h, w, 3]."""

    def read(self, tmp_path, image: Image.Image, name="a.png", **options):
        image.save(tmp_path / name, **options)
        return read_rgb(tmp_path / name)

    def test_rgb_is_taken_as_it_is(self, tmp_path):
        pixels = noise(7, 13)
        np.testing.assert_array_equal(self.read(tmp_path, Image.fromarray(pixels)), pixels)

    def test_gray_becomes_three_equal_channels(self, tmp_path):
        pixels = noise(5, 6, 0)
        got = self.read(tmp_path, Image.fromarray(pixels))
        np.testing.assert_array_equal(got, np.repeat(pixels[..., None], 3, axis=-1))

    def test_transparency_is_laid_over_white(self, tmp_path):
        pixels = noise(4, 4, 4)
        pixels[..., 3] = 255
        pixels[0, 0] = (10, 20, 30, 0)
        got = self.read(tmp_path, Image.fromarray(pixels))
        np.testing.assert_array_equal(got[0, 0], 255)
        np.testing.assert_array_equal(got[1:], pixels[1:, :, :3])

    def test_gray_with_alpha(self, tmp_path):
        pixels = np.array([[[40, 255], [40, 0]]], np.uint8)
        got = self.read(tmp_path, Image.fromarray(pixels, "LA"))
        np.testing.assert_array_equal(got, [[[40] * 3, [255] * 3]])

    def test_a_transparent_palette_color(self, tmp_path):
        image = Image.new("P", (2, 1))
        image.putpalette([200, 0, 0, 0, 0, 200])
        image.putpixel((1, 0), 1)
        got = self.read(tmp_path, image, transparency=0)
        np.testing.assert_array_equal(got, [[[255] * 3, [0, 0, 200]]])

    @pytest.mark.parametrize("name", ["a.png", "a.tif"])
    def test_sixteen_bits_are_stretched_over_eight(self, tmp_path, name):
        pixels = np.array([[1000, 2000], [3000, 4000]], np.uint16)
        got = self.read(tmp_path, Image.fromarray(pixels), name)
        np.testing.assert_array_equal(got[..., 0], [[0, 85], [170, 255]])
        assert got.dtype == np.uint8

    def test_the_largest_of_sixteen_bits_is_white_whatever_it_is(self, tmp_path):
        for high in range(1001, 1400, 7):
            got = self.read(tmp_path, Image.fromarray(np.array([[1000, high]], np.uint16)))
            np.testing.assert_array_equal(got[..., 0], [[0, 255]])

    def test_sixteen_bits_in_the_other_byte_order(self, tmp_path):
        pixels = np.array([[1000, 2000], [3000, 4000]], ">u2")
        image = Image.frombytes("I;16B", (2, 2), pixels.tobytes())
        got = self.read(tmp_path, image, "a.tif")
        np.testing.assert_array_equal(got[..., 0], [[0, 85], [170, 255]])

    def test_a_constant_sixteen_bit_image_is_no_division_by_zero(self, tmp_path):
        got = self.read(tmp_path, Image.fromarray(np.full((3, 3), 700, np.uint16)))
        assert got.shape == (3, 3, 3) and len(np.unique(got)) == 1

    def test_one_bit_and_cmyk(self, tmp_path):
        black = self.read(tmp_path, Image.new("1", (3, 2)))
        np.testing.assert_array_equal(black, np.zeros((2, 3, 3)))
        assert self.read(tmp_path, Image.new("CMYK", (3, 2)), "a.jpg").shape == (2, 3, 3)

    def test_the_cameras_orientation_is_applied(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter
        assert self.read(tmp_path, Image.new("RGB", (6, 2)), "a.jpg", exif=exif).shape == (6, 2, 3)

    def test_a_missing_file_a_folder_and_text_are_one_clear_error(self, tmp_path):
        (tmp_path / "text.png").write_text("not a picture")
        (tmp_path / "empty.png").write_bytes(b"")
        for name in ("none.png", "", "text.png", "empty.png"):
            with pytest.raises(UserError) as caught:
                read_rgb(tmp_path / name)
            assert f"--image={tmp_path / name}" in tiny.one_line(caught.value)

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("ending", ["png", "jpg", "tif", "gif", "webp", "bmp"])
    def test_a_damaged_file_is_read_or_refused_never_a_crash(self, tmp_path, ending):
        Image.fromarray(noise(9, 9)).save(tmp_path / f"whole.{ending}")
        data = (tmp_path / f"whole.{ending}").read_bytes()
        rng = np.random.default_rng(0)
        for i in range(60):
            broken = bytearray(data[: rng.integers(1, len(data))] if i % 2 else data)
            for _ in range(rng.integers(0, 6)):
                broken[rng.integers(len(broken))] = rng.integers(256)
            path = tmp_path / f"broken.{ending}"
            path.write_bytes(bytes(broken))
            try:
                assert read_rgb(path).ndim == 3
            except UserError as error:
                tiny.one_line(error)


@pytest.fixture(scope="module")
def workdir(folders, tmp_path_factory):
    """A run's directory with exported weights that were never trained."""
    folder = tmp_path_factory.mktemp("run")
    tiny.export(tiny.config(folders), folder / "export")
    return folder


@pytest.fixture
def config(folders):
    return tiny.config(folders, eval__ensemble=2, eval__steps=2)


def saved(tmp_path, pixels, name="in.png"):
    Image.fromarray(pixels).save(tmp_path / name)
    return str(tmp_path / name)


@pytest.mark.parametrize("shape", [(41, 27, 4), (1, 1, 3)], ids=["odd+alpha", "pixel"])
def test_it_writes_masks_probabilities_an_overlay_with_legend_and_json(
    config, workdir, tmp_path, shape
):
    out = tmp_path / "mask.png"
    image = saved(tmp_path, noise(*shape))
    predict(config, str(workdir), image, ["snow and ice"], out)
    mask = np.asarray(Image.open(out))
    assert mask.shape == shape[:2] and set(np.unique(mask)) <= {0, 255}
    soft = np.load(tmp_path / "mask.npz")
    assert soft["probability"].shape == (1, *shape[:2]) and list(soft["queries"]) == ["snow and ice"]
    np.testing.assert_array_equal(mask == 255, soft["probability"][0] > 0.5)
    probability = np.asarray(Image.open(tmp_path / "mask.probability.png"))
    np.testing.assert_allclose(probability / 255, soft["probability"][0], atol=0.004)
    overlay = np.asarray(Image.open(tmp_path / "mask.overlay.png"))
    assert overlay.shape[0] > shape[0] and overlay.shape[1] == shape[1]
    said = json.loads((tmp_path / "mask.json").read_text())
    assert said["estep"] == "2x2" and said["queries"][0]["coverage"] == (mask == 255).mean()


def test_a_folder_and_a_vocabulary_file_give_files_for_every_image_and_query(config, workdir, tmp_path):
    pictures, out = tmp_path / "in", tmp_path / "out"
    pictures.mkdir()
    Image.fromarray(noise(32, 32)).save(pictures / "a.png")
    Image.fromarray(noise(20, 40, 0)).save(pictures / "b.jpg")
    (pictures / "notes.txt").write_text("no picture")
    words = tmp_path / "words.txt"
    words.write_text("# what to look for\nwater\n\nsnow and ice\n")
    predict(config, str(workdir), str(pictures), [], out, str(words))
    assert {p.name for p in out.glob("?.json")} == {"a.json", "b.json"}
    for stem, size in (("a", (32, 32)), ("b", (40, 20))):
        for query in ("water", "snow_and_ice"):
            assert Image.open(out / f"{stem}_{query}.png").size == size


def test_unreadable_images_leave_no_empty_folder(config, tmp_path):
    broken, out = tmp_path / "a.png", tmp_path / "out"
    broken.write_bytes(b"\x89PNG")
    refused(config, None, str(broken), ["water"], out)
    assert not out.exists()
    out.mkdir()
    refused(config, None, str(broken), ["water"], out)
    assert out.is_dir()


def test_a_broken_image_among_others_is_named_and_the_others_are_segmented(
    config, workdir, tmp_path, caplog
):
    pictures, out = tmp_path / "in", tmp_path / "out"
    pictures.mkdir()
    for name in ("a.png", "c.png"):
        Image.fromarray(noise(32, 32)).save(pictures / name)
    (pictures / "b.png").write_bytes((pictures / "a.png").read_bytes()[:60])
    message = refused(config, str(workdir), str(pictures), ["water"], out)
    assert message == f"1 of 3 images could not be read: {pictures / 'b.png'}"
    assert {p.name for p in out.glob("*.npz")} == {"a.npz", "c.npz"}
    (told,) = [r.message for r in caplog.records if r.levelname == "ERROR"]
    assert f"{pictures / 'b.png'}: cannot be decoded" in told


def test_the_index_map_and_the_annotations_tell_what_the_soft_masks_do(tmp_path):
    rng, words = np.random.default_rng(0), ["water", "ice", "nothing"]
    soft = rng.random((3, 9, 7)).astype(np.float16).astype(np.float32)
    soft[2] = 0.1
    files = targets([tmp_path / "a.png"], tmp_path / "out", words)[0]
    said = write_prediction(files, noise(9, 7), words, soft, {"image": "/photos/a.png"})

    with Image.open(files.labels) as labels:
        index, colors = np.asarray(labels), np.reshape(labels.getpalette(), (-1, 3))
    np.testing.assert_array_equal(index, np.where(soft.max(0) > 0.5, soft.argmax(0), 255))
    for row in said["queries"]:
        assert row["color"] == to_hex(colors[row["index"]])

    coco = json.loads(files.coco.read_text())
    assert coco["images"] == [{"id": 1, "file_name": "a.png", "height": 9, "width": 7}]
    assert [c["name"] for c in coco["categories"]] == words
    assert [a["category_id"] for a in coco["annotations"]] == [1, 2], "an empty mask has none"
    for found, plane in zip(coco["annotations"], soft, strict=False):
        mask = decode(found["segmentation"]["counts"], *found["segmentation"]["size"])
        np.testing.assert_array_equal(mask, plane > 0.5)
        left, top, width, height = found["bbox"]
        assert mask[top : top + height, left : left + width].sum() == found["area"] == mask.sum()
        assert found["score"] == pytest.approx(plane[mask].mean())


class TestFinding:
    """Images, queries and output files, before anything is computed."""

    def test_a_glob(self, tmp_path):
        for name in ("b1.png", "b2.png", "c.png"):
            saved(tmp_path, noise(2, 2), name)
        assert [p.name for p in find_images(str(tmp_path / "b*.png"))] == ["b1.png", "b2.png"]

    def test_a_file_whose_name_looks_like_a_glob_is_a_file(self, tmp_path):
        assert find_images(saved(tmp_path, noise(2, 2), "a[1].png"))[0].name == "a[1].png"
        (tmp_path / "set[1]").mkdir()
        saved(tmp_path / "set[1]", noise(2, 2), "b.png")
        assert [p.name for p in find_images(str(tmp_path / "set[1]" / "*.png"))] == ["b.png"]

    @pytest.mark.parametrize("where", ["nothing*.png", "empty", "no.png"])
    def test_nothing_there(self, tmp_path, where):
        (tmp_path / "empty" / "folder.png").mkdir(parents=True)
        with pytest.raises(UserError) as caught:
            find_images(str(tmp_path / where))
        assert f"--image={tmp_path / where}" in tiny.one_line(caught.value)

    def test_a_data_set_is_a_vocabulary(self):
        assert find_queries([], "landcover") == list(GROUPS)
        assert find_queries(["a"], "landcover")[:2] == ["a", "water"]

    @pytest.mark.parametrize(
        ("queries", "vocabulary", "told"),
        [([], None, "needs --query"), (["a", " "], None, "empty"), (["a", "a"], None, "twice"),
         ([], "no_such", "--vocabulary=no_such")],
    )  # fmt: skip
    def test_bad_queries(self, queries, vocabulary, told):
        with pytest.raises(UserError) as caught:
            find_queries(queries, vocabulary)
        assert told in tiny.one_line(caught.value)

    def test_two_files_of_one_name_keep_apart_and_two_images_need_a_folder(self, tmp_path):
        pair = [tmp_path / "a.png", tmp_path / "a.jpg"]
        found = targets(pair, tmp_path / "out", ["ice"])
        assert [files.mask(0).name for files in found] == ["a_png.png", "a_jpg.png"]
        with pytest.raises(UserError, match="name a folder"):
            targets(pair, tmp_path / "one.png", ["ice"])


def test_the_overlay_shows_each_query_in_its_color_and_leaves_the_rest():
    image = np.full((4, 6, 3), 100, np.uint8)
    label = np.full((4, 6), -1, np.int32)
    label[:, :1], label[:, 1:3] = 0, 1
    words = ["water", "forest"]
    got = overlay(image, words, label, query_colors(words))
    assert (got[:4, 3:] == 100).all()
    assert len({tuple(c) for c in got[0, :3].tolist()}) == 2 and (got[0, 1] == got[0, 2]).all()


def test_the_same_answer_twice(config, workdir, tmp_path):
    image = saved(tmp_path, noise(32, 32))
    for name in ("a.png", "b.png"):
        predict(config, str(workdir), image, ["water"], tmp_path / name)
    a, b = (np.load(tmp_path / f"{n}.npz")["probability"] for n in "ab")
    np.testing.assert_array_equal(a, b)


def test_without_a_configuration_the_weights_tell_everything(folders, workdir, tmp_path):
    """The same masks as with the run's own configuration, from the run's folder and from its export."""
    image = saved(tmp_path, noise(32, 32))
    predict(tiny.config(folders), str(workdir), image, ["water"], tmp_path / "a.png")
    predict(None, str(workdir), image, ["water"], tmp_path / "b.png")
    once = {"eval.ensemble": 1, "eval.steps": 1}
    predict(None, str(workdir / "export"), image, ["water"], tmp_path / "c.png", settings=once)
    a, b, c = (np.load(tmp_path / f"{name}.npz")["probability"] for name in "abc")
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, c)


def test_another_configuration_than_the_trained_one_is_refused(folders, workdir, tmp_path):
    other = tiny.config(folders, diffusion__prediction_type="sample")
    image = saved(tmp_path, noise(4, 4))
    message = refused(other, str(workdir), image, ["water"], tmp_path / "m.png")
    assert "config.diffusion.prediction_type='sample', trained with 'v_prediction'" in message


def test_an_export_of_before_there_was_a_description_says_what_to_do(config, workdir, tmp_path):
    shutil.copytree(workdir / "export", tmp_path / "export")
    (tmp_path / "export" / "segmenter.json").unlink()
    image = saved(tmp_path, noise(4, 4))
    for given in (config, None):
        message = refused(given, str(tmp_path), image, ["water"], tmp_path / "m.png")
        assert "segmenter.json: missing" in message and "--mode=export" in message


def refused(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        predict(*arguments)
    return tiny.one_line(caught.value)


@pytest.mark.parametrize("query", ["", "   "])
def test_an_empty_query_is_refused(config, workdir, tmp_path, query):
    image, out = saved(tmp_path, noise(4, 4)), tmp_path / "m.png"
    assert "--query: empty" in refused(config, str(workdir), image, ["water", query], out)


def test_a_query_of_too_many_words_is_refused(config, workdir, tmp_path):
    image = saved(tmp_path, noise(4, 4))
    message = refused(config, str(workdir), image, ["water " * 40], tmp_path / "m.png")
    assert "at most 20" in message


def test_a_missing_image_and_missing_weights_are_named(config, workdir, tmp_path):
    out = tmp_path / "m.png"
    missing = str(tmp_path / "no.png")
    assert "no such file" in refused(config, str(workdir), missing, ["water"], out)
    image = saved(tmp_path, noise(4, 4))
    assert "run --mode=train first" in refused(config, str(tmp_path), image, ["water"], out)


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    config, workdir, tmp_path, monkeypatch
):
    def never(*_, **__):
        raise AssertionError("the work was begun")

    monkeypatch.setattr(predict_lib, "load_segmenter", never)
    image = saved(tmp_path, noise(4, 4))
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    for out in (
        tmp_path / "no" / "m.png",
        tmp_path / "folder.png",
        tmp_path / "m.xyz",
        tmp_path / "file",
        Path("gs://bucket/masks"),
    ):
        assert f"--out={out}" in refused(config, str(workdir), image, ["water"], out)


@pytest.mark.parametrize(
    ("queries", "told"),
    [
        (["water", "water "], "'water ': asked twice"),
        (["snow and ice", "snow  and ice"], "asked twice"),
        (["wat\u200ber"], "has a control or invisible character"),
        (["sea\ufe0f"], "has a control or invisible character"),
        (["\ud83d"], "has a control or invisible character"),
        (["\u3164"], "has a control or invisible character"),
        (["..."], "empty; name what to segment"),
        (["for\u00eat", "fore\u0302t"], "asked twice"),
        (["water\nice"], "has a control or invisible character"),
    ],
)
def test_queries_that_look_the_same_are_told(queries, told):
    with pytest.raises(UserError) as caught:
        find_queries(queries, None)
    assert told in tiny.one_line(caught.value)
    assert find_queries(
        ["\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"], None
    )  # a joiner of Persian


@pytest.mark.parametrize(
    "place", ["https://example.org/a.png", "gs://bucket/a.png", "data:image/png;,"]
)
def test_an_address_is_no_file(place):
    with pytest.raises(UserError, match="a web address; download the image and name the file"):
        find_images(place)
