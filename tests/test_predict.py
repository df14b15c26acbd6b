# SPDX-License-Identifier: Apache-2.0
"""Prediction on any picture: sizes, colour modes, windows, and what is told when it cannot work."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from digseg_jax import predict as predict_lib
from digseg_jax.errors import UserError
from digseg_jax.predict import predict, read_image, segment, starts
from digseg_jax.segmentation.inference import EStep
from digseg_jax.tasks.segmentation import SegmentationTask


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


class TestReadImage:
    """Everything comes out as RGB uint8 [h, w, 3]."""

    def read(self, tmp_path, image: Image.Image, name="a.png", **options):
        image.save(tmp_path / name, **options)
        return read_image(tmp_path / name)

    def test_rgb_is_taken_as_it_is(self, tmp_path):
        pixels = noise(7, 13)
        np.testing.assert_array_equal(self.read(tmp_path, Image.fromarray(pixels)), pixels)

    def test_grey_becomes_three_equal_channels(self, tmp_path):
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

    def test_grey_with_alpha(self, tmp_path):
        pixels = np.array([[[40, 255], [40, 0]]], np.uint8)
        got = self.read(tmp_path, Image.fromarray(pixels, "LA"))
        np.testing.assert_array_equal(got, [[[40] * 3, [255] * 3]])

    def test_a_transparent_palette_colour(self, tmp_path):
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
                read_image(tmp_path / name)
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
                assert read_image(path).ndim == 3
            except UserError as error:
                tiny.one_line(error)


SHAPES = [(32, 32), (1, 1), (5, 90), (33, 31), (64, 100), (97, 32), (1, 40)]


class TestWindows:
    """Windows cover the picture, and blending them does not change what they agree on."""

    @pytest.mark.parametrize("size", [32, 128])
    def test_they_cover_every_pixel_and_overlap(self, size):
        for length in [*range(size, 4 * size), 1000]:
            at = starts(length, size)
            assert at[0] == 0 and at[-1] == length - size
            assert all(0 < b - a <= 0.75 * size + 1 for a, b in zip(at, at[1:], strict=False))

    def segment(self, monkeypatch, image, folders):
        """Each window answers with its own pixels' red and green, so the answer is the picture."""

        class Task:
            frozen = None

        def compiled(*_):
            return lambda params, frozen, crops, index: np.moveaxis(crops[..., :2], -1, 1) / 255

        monkeypatch.setattr(predict_lib, "_compiled", compiled)
        config = tiny.config(folders)
        return segment(config, Task(), {}, image, ["a", "b"], EStep(1, 1), 2.0)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_every_pixel_gets_the_answer_of_its_own_place(self, monkeypatch, folders, shape):
        image = noise(*shape)
        got = self.segment(monkeypatch, image, folders)
        np.testing.assert_allclose(got, np.moveaxis(image[..., :2], -1, 0) / 255, atol=1e-6)


@pytest.fixture(scope="module")
def workdir(folders, tmp_path_factory):
    """A run's directory with exported weights that were never trained."""
    folder = tmp_path_factory.mktemp("run")
    task = SegmentationTask(tiny.config(folders), prompts=["water"])
    task.export(jax.device_get(task.initial()), folder / "export", {"task": "test"})
    return folder


@pytest.fixture
def config(folders):
    return tiny.config(folders, eval__ensemble=2, eval__steps=2)


def saved(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "in.png")
    return tmp_path / "in.png"


@pytest.mark.parametrize(
    "shape", [(41, 27, 4), (1, 1, 3), (30, 30, 0)], ids=["odd+alpha", "pixel", "grey"]
)
def test_it_writes_a_mask_a_probability_and_an_overlay(config, workdir, tmp_path, shape):
    out = tmp_path / "mask.png"
    predict(config, str(workdir), saved(tmp_path, noise(*shape)), ["snow and ice"], out)
    mask = np.asarray(Image.open(out))
    assert mask.shape == shape[:2] and set(np.unique(mask)) <= {0, 255}
    probability = np.asarray(Image.open(tmp_path / "mask.probability.png"))
    assert probability.shape == shape[:2]
    np.testing.assert_array_equal(mask[probability > 128], 255)
    assert Image.open(tmp_path / "mask.overlay.png").size == shape[1::-1]


def test_several_queries_make_several_files_and_the_same_answer_twice(config, workdir, tmp_path):
    image = saved(tmp_path, noise(32, 32))
    for name in ("a.png", "b.png"):
        predict(config, str(workdir), image, ["water", "snow and ice"], tmp_path / name)
    for query in ("water", "snow_and_ice"):
        a, b = (tmp_path / f"{n}_{query}.probability.png" for n in "ab")
        assert a.read_bytes() == b.read_bytes()
    assert not (tmp_path / "a.png").exists()


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
    assert "no such file" in refused(config, str(workdir), tmp_path / "no.png", ["water"], out)
    image = saved(tmp_path, noise(4, 4))
    assert "run --mode=train first" in refused(config, str(tmp_path), image, ["water"], out)


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    config, workdir, tmp_path, monkeypatch
):
    def never(*_, **__):
        raise AssertionError("the work was begun")

    monkeypatch.setattr(predict_lib, "segment", never)
    image = saved(tmp_path, noise(4, 4))
    (tmp_path / "folder.png").mkdir()
    for out in (tmp_path / "no" / "m.png", tmp_path / "folder.png", tmp_path / "m.xyz", tmp_path / "m"):
        assert f"--out={out}" in refused(config, str(workdir), image, ["water"], out)
