# SPDX-License-Identifier: Apache-2.0
"""Folders of a prediction: resumed, labeled by tools, and at their place on the earth."""

from __future__ import annotations

import json
import shutil
import types

import numpy as np
import pytest
import tiny
from PIL import Image

from digseg_jax.errors import UserError
from digseg_jax.io.image_file import read_image
from digseg_jax.log import log
from digseg_jax.prediction import job, raster
from digseg_jax.prediction.files import pixels_of
from digseg_jax.prediction.labeling import brush_rle
from digseg_jax.prediction.masks import Masks

WORDS = ["water", "forest"]


class Halves:
    """Answers with the left half for the first word and the right half for the second."""

    def __init__(self):
        self.seen = []
        self.description = types.SimpleNamespace(datasets=[])

    def asks_in(self, own):
        return (own,)

    def __call__(self, source, texts, ensemble, steps, seed, **_):
        self.seen.append(source.name)
        pixels = pixels_of(source)
        left = np.arange(pixels.shape[1]) < pixels.shape[1] // 2
        planes = [np.where(left == (k == 0), 0.75, 0.25) for k in range(len(texts))]
        planes = [np.broadcast_to(p.astype(np.float32), pixels.shape[:2]) for p in planes]
        answer = types.SimpleNamespace(probability=planes.__getitem__)
        colors = np.zeros((len(texts), 3), np.uint8)
        return Masks(pixels, tuple(texts), answer, {"image": str(source), "estep": "1x1"}, colors)


@pytest.fixture
def model(monkeypatch):
    found = Halves()
    monkeypatch.setattr(job, "load_segmenter", lambda *_: found)
    monkeypatch.setattr(job, "far_queries", lambda *_: {})
    monkeypatch.setattr(job, "use_own_compile_cache", lambda _: None)
    return found


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i, name in enumerate(("a.png", "b.png", "c.png")):
        pixels = np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def predict(photos, **options):
    once = {"eval.ensemble": 1, "eval.steps": 1}
    options = {"queries": WORDS, "out": photos.parent / "out", "settings": once} | options
    job.predict(None, None, options.pop("images", str(photos)), **options)
    return options["out"]


def test_a_second_call_makes_only_what_is_missing_or_would_differ(model, photos, monkeypatch):
    told = []
    monkeypatch.setattr(log, "info", lambda text, *a, **_: told.append(text % a))
    out = predict(photos)
    assert model.seen == ["a.png", "b.png", "c.png"] and not [
        t for t in told if "already have masks" in t
    ]

    # A lost file, a prediction that was killed while its files were moved, another image.
    (out / "a.npz").unlink()
    summary = json.loads((out / "b.json").read_text())
    (out / "b.json").write_text(json.dumps({k: v for k, v in summary.items() if k != "complete"}))
    model.seen.clear()
    predict(photos)
    assert model.seen == ["a.png", "b.png"]
    assert [t for t in told if t.startswith("1 of 3 images already have masks")]
    (photos / "c.png").write_bytes((photos / "a.png").read_bytes())
    model.seen.clear()
    predict(photos)
    assert model.seen == ["c.png"]

    # With nothing left to do no weights are loaded; other settings make everything again.
    monkeypatch.setattr(job, "load_segmenter", None)
    predict(photos)
    monkeypatch.setattr(job, "load_segmenter", lambda *_: model)
    for changed in (
        {"settings": {"eval.ensemble": 2, "eval.steps": 1}},
        {"settings": {"eval.ensemble": 1, "eval.steps": 1, "seed": 3}},
        {"vocabulary": "camvid", "queries": []},
    ):
        model.seen.clear()
        predict(photos, **changed)
        assert model.seen == ["a.png", "b.png", "c.png"], changed


def decoded(data):
    """Values of @thi.ng/rle-pack: an independent, bit by bit, decoder."""
    bits = "".join(f"{byte:08b}" for byte in data)
    at = 0

    def read(count):
        nonlocal at
        at += count
        return int(bits[at - count : at], 2)

    total, word = read(32), read(5) + 1
    sizes = [read(4) + 1 for _ in range(4)]
    values = []
    while len(values) < total:
        run = read(1)
        count = read(sizes[read(2)]) + 1
        values += [read(word)] * count if run else [read(word) for _ in range(count)]
    return values


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_brush_runs_hold_the_mask(share):
    mask = np.random.default_rng(0).random((160, 150)) < share  # long runs are split
    assert decoded(brush_rle(mask)) == np.repeat(255 * mask.ravel(), 4).tolist()


def test_images_of_equal_names_are_named_from_their_common_folder(model, photos, tmp_path):
    """A labeling tool would show one image with the masks of both."""
    other = tmp_path / "more" / "deep"
    other.mkdir(parents=True)
    shutil.copy(photos / "b.png", other / "a.png")
    out = predict(photos, images=[str(photos / "a.png"), str(other / "a.png")], formats=["coco"])
    found = [i["file_name"] for i in json.loads((out / "all.coco.json").read_text())["images"]]
    assert len(set(found)) == 2 and all(name.endswith("/a.png") for name in found)


def test_one_file_of_all_images_for_each_tool(model, photos):
    out = predict(photos, formats=["coco", "label_studio"])
    coco = json.loads((out / "all.coco.json").read_text())
    assert [(i["id"], i["file_name"]) for i in coco["images"]] == [
        (1, "a.png"),
        (2, "b.png"),
        (3, "c.png"),
    ]
    assert [a["id"] for a in coco["annotations"]] == [1, 2, 3, 4, 5, 6]
    assert [a["image_id"] for a in coco["annotations"]] == [1, 1, 2, 2, 3, 3]

    tasks = json.loads((out / "all.label_studio.json").read_text())
    assert [t["data"]["image"] for t in tasks] == [f"/data/local-files/?d={n}.png" for n in "abc"]
    for result, left in zip(tasks[1]["predictions"][0]["result"], (True, False), strict=True):
        assert result["value"]["brushlabels"] == ["water" if left else "forest"]
        plane = np.reshape(decoded(result["value"]["rle"]), (6, 8, 4))[..., 3] > 0
        assert plane[:, :4].all() == left and plane[:, 4:].any() != left


@pytest.mark.parametrize(
    ("out", "name", "message"), [("a.png", "a", "needs a folder"), ("out", "all", "rename the image")]
)
def test_a_file_of_all_images_needs_a_place(model, tmp_path, out, name, message):
    Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.jpg")
    with pytest.raises(UserError, match=message) as caught:
        predict(tmp_path / f"{name}.jpg", out=tmp_path / out, formats=["coco"])
    assert "--format=coco" in tiny.one_line(caught.value) and not model.seen


class TestGeoTiff:
    @pytest.fixture
    def rasterio(self):
        return pytest.importorskip("rasterio", reason="needs: pip install rasterio")

    def save(self, rasterio, path, bands, **options):
        place = rasterio.transform.from_origin(500_000, 4_600_000, 10, 10)
        options = {"crs": "EPSG:32633", "transform": place} | options
        count, height, width = bands.shape
        with rasterio.open(
            path, "w", driver="GTiff", dtype=bands.dtype.name, count=count, height=height, width=width,
            **options,
        ) as out:  # fmt: skip
            out.write(bands)

    @pytest.mark.parametrize("count", [3, 4, 13])
    def test_bands_of_16_bits_are_seen_as_their_8_bit_rendering(self, rasterio, tmp_path, count):
        bands = np.random.default_rng(0).integers(300, 4000, (count, 20, 30)).astype(np.uint16)
        self.save(rasterio, tmp_path / "a.tif", bands, tiled=True, blockxsize=16, blockysize=16)
        rgb = np.moveaxis(bands[:3], 0, -1).astype(np.float32)
        expected = (rgb - rgb.min()) * (255 / (rgb.max() - rgb.min()))
        seen = read_image(tmp_path / "a.tif").upright().astype(np.float32)
        assert np.abs(seen - expected).max() < 0.501 and seen.max() == 255

    def test_masks_keep_the_place_of_the_image(self, rasterio, model, tmp_path):
        bands = np.random.default_rng(0).integers(0, 255, (3, 6, 8)).astype(np.uint8)
        self.save(rasterio, tmp_path / "a.tif", bands)
        out = predict(tmp_path / "a.tif")
        with rasterio.open(tmp_path / "a.tif") as source:
            place = source.crs, source.transform
        with rasterio.open(out / "a.labels.tif") as labels:
            assert (labels.crs, labels.transform) == place and labels.nodata == 255
            assert (labels.read(1)[:, :4] == 0).all() and (labels.read(1)[:, 4:] == 1).all()
        with rasterio.open(out / "a.probability.tif") as soft:
            assert (soft.crs, soft.transform) == place and soft.descriptions == ("water", "forest")
            np.testing.assert_array_equal(soft.read(1)[:, :4], round(255 * 0.75))

    @pytest.mark.parametrize(
        ("count", "kind", "options"),
        [(3, np.uint8, {}), (1, np.uint8, {}), (5, np.uint16, {}), (5, np.uint8, {}),
         (4, np.uint8, {"photometric": "RGB", "alpha": "YES"})],
    )  # fmt: skip
    def test_a_large_raster_is_read_and_written_by_rows(
        self, rasterio, model, tmp_path, monkeypatch, count, kind, options
    ):
        bands = np.random.default_rng(0).integers(0, np.iinfo(kind).max, (count, 40, 30)).astype(kind)
        self.save(rasterio, tmp_path / "a.tif", bands, **options)
        small = tmp_path / "b.tif"
        self.save(rasterio, small, bands[:, :9])
        pixels, seen = read_image(tmp_path / "a.tif").upright(), []

        def rows(segmenter, source, texts, estep, seed, advance, *, templates):
            """Answers like `Halves`, in bands of 15 rows, and keeps what it is shown."""
            for first in range(0, 40, 15):
                seen.append(source.rows(first, min(first + 15, 40)))
                left = np.broadcast_to(np.arange(30) < 15, seen[-1].shape[:2])
                yield first, np.where([left, ~left], 0.75, 0.25).astype(np.float32)

        monkeypatch.setattr(raster, "MAX_PIXELS", 1000)
        monkeypatch.setattr(job, "segment_raster", rows)
        model.mode, model.short_side = "window", 0
        out = predict(tmp_path / "*.tif", formats=["coco"])
        # Pillow rounds what is transparent in another way.
        np.testing.assert_allclose(np.concatenate(seen), pixels, atol=1 if "alpha" in options else 0)
        assert sorted(p.name for p in out.glob("a.*")) == [
            "a.json",
            "a.labels.tif",
            "a.probability.tif",
        ]

        # The same files as those of a small raster, and a second call leaves them.
        for end in ("labels", "probability"):
            with rasterio.open(out / f"a.{end}.tif") as a, rasterio.open(out / f"b.{end}.tif") as b:
                assert (a.crs, a.transform, a.nodata) == (b.crs, b.transform, b.nodata)
                assert a.descriptions == b.descriptions and a.profile["dtype"] == b.profile["dtype"]
                np.testing.assert_array_equal(a.read()[:, :9], b.read())
        told = [json.loads((out / f"{name}.json").read_text()) for name in "ab"]
        assert [q["coverage"] for q in told[0]["queries"]] == [0.5, 0.5]
        assert told[0].keys() - told[1].keys() == {"seed", "templates"}  # the stand-in has none
        assert [i["file_name"] for i in json.loads((out / "all.coco.json").read_text())["images"]] == [
            "b.tif"
        ]
        seen.clear()
        predict(tmp_path / "*.tif")
        assert seen == [] and model.seen == ["b.tif"]
        with pytest.raises(UserError, match="so large a raster gets GeoTIFFs; name a folder"):
            predict(tmp_path / "a.tif", out=tmp_path / "a.png")

    def test_a_large_raster_without_a_finite_number_does_not_stop_the_others(
        self, rasterio, model, tmp_path, monkeypatch
    ):
        """One whose numbers are all equal is seen as gray, like other images of 16 bits."""
        flat = np.full((3, 40, 30), 20_000, np.uint16)
        self.save(rasterio, tmp_path / "a.tif", np.full((3, 40, 30), np.nan, np.float32))
        self.save(rasterio, tmp_path / "b.tif", flat)
        self.save(rasterio, tmp_path / "c.tif", flat[:, :9])
        seen = []

        def rows(segmenter, source, texts, estep, seed, advance, *, templates):
            seen.append(source.rows(0, 40))
            yield 0, np.full((2, 40, 30), 0.25, np.float32)

        monkeypatch.setattr(raster, "MAX_PIXELS", 1000)
        monkeypatch.setattr(job, "segment_raster", rows)
        model.mode, model.short_side = "window", 0
        with pytest.raises(UserError, match="1 of 3 images could not be read: .*a.tif"):
            predict(tmp_path / "*.tif")
        np.testing.assert_array_equal(seen[0], 20_000 // 256)
        assert (tmp_path / "out" / "b.labels.tif").exists()
        assert model.seen == ["c.tif"]

    def test_a_large_raster_that_is_to_be_seen_whole_is_refused_before_any_image(
        self, model, photos, monkeypatch
    ):
        monkeypatch.setattr(job, "is_large", lambda path: path.name == "c.png")
        model.mode = "whole"
        with pytest.raises(
            UserError, match=r"inference='whole': .*c.png is too large to be seen whole"
        ):
            predict(photos)
        assert model.seen == []

    def test_without_rasterio_masks_are_made_and_a_hint_is_given(self, model, tmp_path, monkeypatch):
        image = Image.fromarray(np.zeros((6, 8, 3), np.uint8))
        tags = {33550: (10.0, 10.0, 0.0), 33922: (0.0, 0.0, 0.0, 5e5, 4.6e6, 0.0)}
        image.save(tmp_path / "a.tif", tiffinfo=tags)
        monkeypatch.setattr(job, "has_rasterio", lambda: False)
        told = []
        monkeypatch.setattr(log, "info", lambda text, *a, **_: told.append(text % a))
        out = predict(tmp_path / "a.tif")
        assert (out / "a.npz").is_file() and not (out / "a.labels.tif").exists()
        assert [t for t in told if "georeferenced images: 1" in t and "pip install rasterio" in t]
