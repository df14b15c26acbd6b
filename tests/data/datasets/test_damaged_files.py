# SPDX-License-Identifier: Apache-2.0
"""Five hundred damaged files: each is an error or a skip; no crash, hang, bomb or wrong label."""

from __future__ import annotations

import faulthandler
import io
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from digseg_jax.config.schema import PartConfig
from digseg_jax.data.checked import Guarded
from digseg_jax.data.sources import open_part, spec_of
from digseg_jax.errors import UserError

COUNT = 500
CLASSES = 11
SHAPE = (48, 64)
LIMIT = 10  # seconds for one file, far above what any takes
MEMORY = 600  # MB that all of them together may add


def picture(rng):
    """Smooth enough for JPEG to be small, odd enough to show any change."""
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    return coarse.resize(SHAPE[::-1], Image.Resampling.BICUBIC)


def label(rng):
    return rng.integers(0, CLASSES + 1, SHAPE).astype(np.uint8)  # 11 is void


def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(kind, width, height):
    """A few bytes that claim an enormous image, with valid checksums."""
    if kind == "PNG":
        header = struct.pack(">IIBBBBB", width, height, 8, 0 if kind == "L" else 2, 0, 0, 0)
        body = zlib.compress(bytes(1000))
        chunks = ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(k, d) for k, d in chunks)
    data = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG"))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", min(height, 65535), min(width, 65535))
    return bytes(data)


def damage(data, rng):
    """Damage of the bytes themselves."""
    how = rng.integers(6)
    if how == 0:
        return data[: int(rng.integers(len(data)))]
    if how == 1:
        return b""
    if how == 2:
        return rng.bytes(int(rng.integers(1, 400)))
    if how == 3:
        return bytes(len(data))
    changed = bytearray(data)
    if how == 4:
        for place in rng.integers(len(data), size=int(rng.integers(1, 12))):
            changed[place] ^= 1 << int(rng.integers(8))
        return bytes(changed)
    start = int(rng.integers(len(data)))
    return bytes(changed[:start] + changed[start + int(rng.integers(1, 60)) :])


def damaged_pair(rng):
    """Image bytes, label bytes, and the ids that the label had: one of the two files is bad."""
    ids = label(rng)
    image = encoded(picture(rng), "JPEG", quality=90)
    mask = encoded(Image.fromarray(ids), "PNG")
    how = rng.integers(9)
    if how < 3:
        return damage(image, rng), mask, ids
    if how < 6:
        return image, damage(mask, rng), ids
    width, height = (int(v) for v in rng.choice([30_000, 65_500, 2**31 - 1], 2))
    if how == 6:
        return bomb(str(rng.choice(["PNG", "JPEG"])), width, height), mask, ids
    if how == 7:
        return image, bomb("PNG", width, height), ids
    wrong = [
        Image.fromarray(ids).convert("RGB"),  # three channels
        Image.fromarray(ids).convert("LA"),
        Image.fromarray(ids[:-1]),  # another size
        Image.fromarray(ids.T.copy()),
        Image.fromarray(np.where(ids == 3, 77, ids).astype(np.uint8)),  # no such class
        Image.fromarray(ids.astype(np.float32)),
    ]
    chosen = wrong[int(rng.integers(len(wrong)))]
    return image, encoded(chosen, "TIFF" if chosen.mode == "F" else "PNG"), ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("camvid")
    truth = []
    for kind in ("images", "annotations"):
        (root / kind / "train").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(COUNT + 20):
        if i < COUNT:
            image, mask, ids = damaged_pair(rng)
        else:
            ids = label(rng)
            image = encoded(picture(rng), "JPEG", quality=90)
            mask = encoded(Image.fromarray(ids), "PNG")
        (root / "images" / "train" / f"{i:04d}.jpg").write_bytes(image)
        (root / "annotations" / "train" / f"{i:04d}.png").write_bytes(mask)
        truth.append(np.where(ids == CLASSES, -1, ids.astype(np.int32)))
    return root, truth


def source_of(folder, on_error, seed=0):
    part = PartConfig("camvid", str(folder))
    return Guarded(open_part(part, "train"), spec_of(part).num_classes, on_error, seed)


@pytest.fixture
def watchdog():
    """Ends the test run with a traceback if a file hangs the decoder."""
    faulthandler.dump_traceback_later(COUNT * LIMIT / 10, exit=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    faulthandler.cancel_dump_traceback_later()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEMORY


@pytest.mark.usefixtures("watchdog")
def test_a_damaged_file_is_an_error_that_names_it_or_has_its_true_label(folder):
    root, truth = folder
    source = source_of(root, "raise")
    errors = 0
    for i in range(COUNT):
        try:
            example = source[i]
        except UserError as error:
            errors += 1
            assert f"{i:04d}" in str(error) and "\n" not in str(error)
        else:  # a flipped bit of a JPEG may pass as an image; a label may not change
            np.testing.assert_array_equal(example["label"], truth[i], err_msg=str(i))
            assert example["image"].shape == (*SHAPE, 3)
    assert errors > 0.8 * COUNT


@pytest.mark.usefixtures("watchdog")
def test_skipping_gives_a_true_example_for_most_and_a_clear_end_for_the_rest(folder):
    root, truth = folder
    names = {}
    for attempt in range(2):
        source = source_of(root, "skip")
        for i in range(0, COUNT, 5):
            try:
                example = source[i]
            except UserError as error:
                assert "all broken" in str(error)
                got = None
            else:
                got = example["name"]
                np.testing.assert_array_equal(example["label"], truth[int(got)])
            assert names.setdefault(i, got) == got, attempt
    assert sum(v is not None for v in names.values()) > 10
