# SPDX-License-Identifier: Apache-2.0
"""Names of a prediction's files: none is an input, another mask, or somebody else's file."""

from __future__ import annotations

import json
import os
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from digseg_jax.errors import UserError
from digseg_jax.io.names import distinct, key
from digseg_jax.prediction.files import find_images, write_prediction
from digseg_jax.prediction.targets import PredictionFiles, targets

SUMMARY = {"estep": "1x1", "queries": [], "height": 1, "width": 1}


def image(path: Path) -> Path:
    Image.new("RGB", (4, 3), "red").save(path)
    return path


def names(planned: list[PredictionFiles]) -> list[str]:
    return [file.name for files in planned for file in files]


def write(files: PredictionFiles, queries, source: Path | None = None):
    pixels, mask = np.zeros((3, 4, 3), np.uint8), np.full((3, 4), 0.75, np.float32)
    facts = {"estep": "1x1"} | ({"image": str(source)} if source else {})
    return write_prediction(files, pixels, queries, [mask] * len(queries), facts)


def test_queries_of_one_slug_have_files_of_their_own(tmp_path):
    queries = ["water/land", "water-land", "water land", "Water", "water"]
    files = PredictionFiles.of(tmp_path / "a", queries)
    write(files, queries)
    written = sorted(p.name for p in tmp_path.iterdir())
    assert len({key(name) for name in written}) == len(written) == 5 + 2 * len(queries)
    rows = json.loads((tmp_path / "a.json").read_text())["queries"]
    assert [row["mask"] for row in rows] == [
        "a_water_land.png", "a_water_land_2.png", "a_water_land_3.png", "a_water.png", "a_water_2.png",
    ]  # fmt: skip


def test_masks_of_different_images_have_files_of_their_own(tmp_path):
    """`a` + "snow and ice" is `a_snow` + "and ice"."""
    planned = targets([Path("a.jpg"), Path("a_snow.jpg")], tmp_path, ["snow and ice", "and ice"])
    assert len({key(name) for name in names(planned)}) == len(names(planned))
    planned = targets([Path("A.jpg"), Path("a.jpg"), Path("a.png")], tmp_path, ["ice"])
    assert len({key(name) for name in names(planned)}) == len(names(planned))


def test_unicode_forms_and_cases_are_one_name():
    assert distinct(["Caf\u00e9", "cafe\u0301", "x"]) == ["Caf\u00e9", "cafe\u0301_2", "x"]


def test_the_folder_of_the_images_keeps_its_images(tmp_path):
    """--out is where the images are: they were replaced by masks."""
    inputs = [
        image(tmp_path / "photo.png"),
        image(tmp_path / "photo_png.png"),
        image(tmp_path / "b.jpg"),
    ]
    before = {path: path.read_bytes() for path in inputs}
    for source, files in zip(inputs, targets(inputs, tmp_path, ["ice"]), strict=True):
        write(files, ["ice"], source)
    assert {path: path.read_bytes() for path in inputs} == before
    # The same command again replaces its own files, and no other.
    count = len(list(tmp_path.iterdir()))
    for source, files in zip(inputs, targets(inputs, tmp_path, ["ice"]), strict=True):
        write(files, ["ice"], source)
    assert len(list(tmp_path.iterdir())) == count == 3 + 3 * 7


def test_a_link_to_an_image_is_that_image(tmp_path):
    source = image(tmp_path / "a.jpg")
    (tmp_path / "out").mkdir()
    os.link(source, tmp_path / "out" / "a.png")
    (files,) = targets([source], tmp_path / "out", ["ice"])
    assert files.mask(0).name == "a_jpg.png"
    with pytest.raises(UserError, match="would replace the image .*a.png"):
        write(PredictionFiles.of(tmp_path / "out" / "a", ["ice"]), ["ice"], source)


def test_a_named_mask_is_not_the_image_and_replaces_nothing_beside_it(tmp_path):
    source = image(tmp_path / "a.png")
    with pytest.raises(UserError) as caught:
        targets([source], tmp_path / "a.png", ["ice"])
    assert f"--out={tmp_path / 'a.png'}: would replace the image" in tiny.one_line(caught.value)
    (tmp_path / "b.json").write_text('{"shapes": []}')  # of a labeling tool
    with pytest.raises(UserError, match=r"would replace .*b.json, which no prediction wrote"):
        targets([source], tmp_path / "b.png", ["ice"])
    (tmp_path / "b.json").write_text(json.dumps(SUMMARY))
    assert targets([source], tmp_path / "b.png", ["ice"])[0].mask(0) == tmp_path / "b.png"


def test_labels_of_other_tools_in_the_folder_stay(tmp_path):
    (tmp_path / "a.json").write_text('{"shapes": []}')
    assert names(targets([Path("a.jpg")], tmp_path, ["ice"]))[0] == "a_jpg.json"


def test_a_name_that_is_not_utf_8_is_written_readably(tmp_path):
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/gr\xfcn.jpg"))
    source.write_bytes(image(tmp_path / "a.png").read_bytes())
    (files,) = targets([source], tmp_path / "out", ["ice"])
    write(files, ["ice"], source)
    assert files.mask(0).name == "gr\ufffdn.png"
    assert json.loads(files.summary.read_text(encoding="utf-8"))["image"].endswith("gr\ufffdn.jpg")


def test_a_disk_that_fails_leaves_the_earlier_files_whole(tmp_path):
    files = PredictionFiles.of(tmp_path / "a", ["ice"])
    write(files, ["ice"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def masks():
        raise OSError(28, "No space left on device")
        yield

    with pytest.raises(UserError, match="No space left"):
        write_prediction(files, np.zeros((3, 4, 3), np.uint8), ["ice"], masks(), {})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_pipe_is_not_replaced_by_a_mask(tmp_path):
    os.mkfifo(tmp_path / "mask.png")
    with pytest.raises(UserError, match="a pipe or a device"):
        targets([image(tmp_path / "a.png")], tmp_path / "mask.png", ["ice"])


def test_long_names_are_cut_and_stay_apart(tmp_path):
    queries = ["雪" * 200, "雪" * 201]
    write(PredictionFiles.of(tmp_path / "a", queries), queries)
    (files,) = targets([Path("b" * 240 + ".png")], tmp_path, queries)
    write(files, queries)
    written = [path.name for path in tmp_path.iterdir()]
    assert len(written) == len({key(name) for name in written}) == 2 * (5 + 2 * len(queries))
    assert max(len(os.fsencode(name)) for name in written) <= 255  # what a file system takes


def test_many_images_take_no_quadratic_time(tmp_path):
    start = time.process_time()
    planned = targets([Path(f"in/{i:06}.jpg") for i in range(20_000)], tmp_path, ["ice"])
    assert len(planned) == 20_000 and time.process_time() - start < 15


def test_home_is_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (files,) = targets([Path("a.jpg")], Path("~/masks"), ["ice"])
    assert files.base == tmp_path / "masks" / "a"


def test_a_second_folder_of_equal_names_replaces_nothing_of_the_first(tmp_path):
    """Both have an a.png: the first one's prediction was replaced without a word."""
    first, second, out = (tmp_path / name for name in ("first", "second", "out"))
    for folder in (first, second, out):
        folder.mkdir()
    source, other = image(first / "a.png"), second / "a.png"
    Image.new("RGB", (4, 3), "blue").save(other)
    (files,) = targets([source], out, ["ice"])
    write(files, ["ice"], source)
    (again,) = targets([source], out, ["ice"])
    (beside,) = targets([other], out, ["ice"])
    assert files == again and not {*names([files])} & {*names([beside])}


def test_the_same_image_at_another_path_is_the_same_image(tmp_path):
    source = image(tmp_path / "a.png")
    facts = {"image": "photos/a.png", "image_crc32": zlib.crc32(source.read_bytes())}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.json").write_text(json.dumps(SUMMARY | facts))
    assert targets([source], tmp_path / "out", ["ice"])[0].summary == tmp_path / "out" / "a.json"


def test_masks_beside_the_images_are_not_segmented_in_the_next_run(tmp_path):
    sources = [image(tmp_path / "a.png"), image(tmp_path / "b c.jpg"), image(tmp_path / "a_ice.png")]
    queries = ["ice", "snow"]
    for source, files in zip(sources, targets(sources, tmp_path, queries), strict=True):
        write(files, queries, source)
    assert find_images(str(tmp_path)) == sorted(sources)
