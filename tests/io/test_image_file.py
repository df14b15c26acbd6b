# SPDX-License-Identifier: Apache-2.0
"""Images of every mode, depth and format come as the same RGB to training and to prediction."""

from __future__ import annotations

import io
import os
import struct
import zlib

import cv2
import numpy as np
import pytest
import tiny
from PIL import Image

from digseg_jax.data.datasets import registry
from digseg_jax.data.datasets.decode import read_index_image
from digseg_jax.errors import UserError
from digseg_jax.io.files import UnreadableError
from digseg_jax.io.image_file import IMAGE_ENDINGS, check_dimensions, read_image
from digseg_jax.prediction.files import find_images, read_rgb

SIDE = 6


def ramp(low: int, high: int, dtype=np.uint16) -> np.ndarray:
    return np.linspace(low, high, SIDE * SIDE).astype(dtype).reshape(SIDE, SIDE)


def half_clear() -> np.ndarray:
    """RGBA: dark red, its right half fully transparent."""
    pixels = np.full((SIDE, SIDE, 4), (100, 0, 0, 255), np.uint8)
    pixels[:, SIDE // 2 :, 3] = 0
    return pixels


def palette() -> Image.Image:
    image = Image.fromarray((np.arange(SIDE * SIDE) % 2).astype(np.uint8).reshape(SIDE, SIDE))
    image.putpalette([200, 0, 0, 0, 0, 200])
    return image


# name -> (image or bytes, options of saving, mean of the RGB that is right)
CASES = {
    "rgba.png": (Image.fromarray(half_clear()), {}, (100 / 3 + 255) / 2),
    "la.png": (Image.fromarray(half_clear()[..., [0, 3]], "LA"), {}, (100 + 255) / 2),
    "palette.png": (palette(), {"transparency": 0}, (255 + 200 / 3) / 2),
    "palette.gif": (palette(), {"transparency": 0}, (255 + 200 / 3) / 2),
    "camera12.png": (Image.fromarray(ramp(0, 4095)), {}, 127.5),
    "deep32.tif": (Image.fromarray(ramp(10**6, 2 * 10**6, np.int32)), {}, 127.5),
    "float.tif": (Image.fromarray(ramp(-1, 3, np.float32)), {}, 127.5),
    "gray.bmp": (Image.fromarray(np.full((SIDE, SIDE), 77, np.uint8)), {}, 77),
    "cmyk.jpg": (Image.new("CMYK", (SIDE, SIDE)), {}, 255),
    "lossless.webp": (Image.fromarray(half_clear()), {"lossless": True}, (100 / 3 + 255) / 2),
}


@pytest.mark.parametrize("name", CASES)
def test_training_and_prediction_read_the_same_pixels(tmp_path, name):
    image, options, mean = CASES[name]
    for part in ("images", "masks"):
        (tmp_path / part / "train").mkdir(parents=True)
    path = tmp_path / "images" / "train" / name
    image.save(path, **options)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    Image.fromarray(mask).save((tmp_path / "masks" / "train" / name).with_suffix(".png"))
    (tmp_path / "classes.txt").write_text("soil\nwater\n")

    trained = registry.open_source("folder", tmp_path, "train")[0]["image"]
    np.testing.assert_array_equal(trained, read_rgb(path))
    assert trained.dtype == np.uint8 and abs(trained.mean() - mean) < 1.5


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_colors_of_a_twelve_bit_camera_are_not_black(tmp_path, channels, ending):
    """Pillow alone would keep the upper 8 of 16 bits: at most 15 of 255."""
    deep = np.repeat(ramp(0, 4095)[..., None], channels, axis=-1)
    if channels == 4:
        deep[..., 3] = 65535
    cv2.imwrite(str(tmp_path / f"a.{ending}"), deep)
    got = read_image(tmp_path / f"a.{ending}").pixels
    assert got.min() == 0 and got.max() == 255 and abs(got.mean() - 127.5) < 1.5


def test_what_is_no_number_is_black_and_nothing_else_is_an_error(tmp_path):
    values = np.array([[np.nan, 1.0], [2.0, np.inf]], np.float32)
    Image.fromarray(values).save(tmp_path / "some.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "some.tif").pixels[..., 0], [[0, 0], [255, 0]])
    Image.fromarray(values * np.nan).save(tmp_path / "none.tif")
    with pytest.raises(UnreadableError, match="none of its values is a finite number"):
        read_image(tmp_path / "none.tif")


def test_a_file_that_would_start_a_program_is_not_opened(tmp_path):
    """Ghostscript draws EPS; the name of the file says PNG."""
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    (tmp_path / "x.png").write_bytes(postscript)
    with pytest.raises(UserError) as caught:
        read_rgb(tmp_path / "x.png")
    assert "not one of JPEG, PNG, TIFF, BMP, GIF, WEBP" in tiny.one_line(caught.value)


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"\0\0\0\x18ftypheic", "but HEIC: convert it"),  # a phone's
        (b"\0\0\0\x20ftypisom", "but a video"),
        (b"<!DOCTYPE html>", "but a page of HTML"),  # a download that failed
        (b"\r\n\n<html>", "but a page of HTML"),
        (b'{"error": "not found"}', "but JSON"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "but JPEG XL"),
        (b"\x5c\x01\0\0", "but NIfTI"),
        (b"%PDF-1.7", "but PDF"),
        (bytes(128) + b"DICM", "but DICOM"),
        (b"PK\x03\x04", "but a ZIP archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of git-LFS; `git lfs pull`"),
    ],
)
def test_other_kinds_of_files_are_named(tmp_path, start, kind):
    (tmp_path / "x.jpg").write_bytes(start + bytes(40))
    with pytest.raises(UnreadableError) as caught:
        read_image(tmp_path / "x.jpg")
    assert kind in tiny.one_line(caught.value) and "object at" not in str(caught.value)


def test_pipes_and_devices_are_told_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero"):
        with pytest.raises(UserError) as caught:
            read_rgb(find_images(str(path))[0])
        assert tiny.one_line(caught.value) == f"--image={path}: not a regular file"


def test_the_limit_of_pixels_is_one(tmp_path):
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    data += b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    (tmp_path / "large.png").write_bytes(data)
    with pytest.raises(UnreadableError, match="400,000,000 pixels"):
        read_image(tmp_path / "large.png")
    with pytest.raises(ValueError, match="pixels"):
        check_dimensions(data)


def test_files_that_desktops_leave_behind_are_no_images(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "x.jpg")
    (tmp_path / "._x.jpg").write_bytes(b"\0\5\x16\7 resource fork")
    assert [p.name for p in find_images(str(tmp_path))] == ["x.jpg"]


def test_every_ending_that_is_listed_is_read(tmp_path):
    for ending in IMAGE_ENDINGS:
        Image.new("RGB", (3, 2), "white").save(tmp_path / f"a{ending}")
        assert read_image(tmp_path / f"a{ending}").pixels.shape == (2, 3, 3)


@pytest.mark.parametrize("bits", [2, 4])
def test_gray_indices_of_few_bits_are_what_the_file_stores(tmp_path, bits):
    """Pillow spreads them over 0..255: class 3 of 4 bits would be 51."""
    rows = np.array([[0, 1, 2, 3]] * 2, np.uint8)
    row = int("".join(f"{v:0{bits}b}" for v in rows[0]), 2).to_bytes(4 * bits // 8, "big")
    packed = (b"\0" + row) * 2  # each row with its filter, none
    buffer = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    buffer.seek(0, 2)
    header = struct.pack(">IIBBBBB", 4, 2, bits, 0, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(packed)), (b"IEND", b"")):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        buffer.write(struct.pack(">I", len(data)) + kind + data + crc)
    (tmp_path / "mask.png").write_bytes(buffer.getvalue())
    np.testing.assert_array_equal(read_index_image(tmp_path / "mask.png"), rows)
