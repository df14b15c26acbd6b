# SPDX-License-Identifier: Apache-2.0
"""Exported weights as a Python object: what it takes, what it answers, and that others answer alike."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny
from PIL import Image

from digseg_jax import jobs
from digseg_jax.config.parse import sampling_settings
from digseg_jax.config.sampling import EStep
from digseg_jax.errors import UserError
from digseg_jax.io.files import UnreadableError
from digseg_jax.metrics import confusion
from digseg_jax.prediction.job import predict
from digseg_jax.prediction.pretrained import load_segmenter
from digseg_jax.prediction.request import Request
from digseg_jax.prediction.resume import marks_of

WORDS = ["water", "snow and ice"]


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def config(folders):
    # one view a device: whatever the number of devices, each runs the same program
    return tiny.config(folders, eval__view_size=(32,), eval__batch_size=1, seed=4)


@pytest.fixture(scope="module")
def export(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "weights"
    tiny.export(config, folder)
    return folder


@pytest.fixture(scope="module")
def segment(export):
    return load_segmenter(export)


@pytest.fixture(scope="module")
def masks(segment):
    return segment(noise(40, 52), WORDS, ensemble=1, steps=1)


class TestMasks:
    """The answer about one image."""

    def test_probabilities_and_labels_are_of_the_images_size(self, masks):
        assert masks.probability.shape == (2, 40, 52) and masks.probability.dtype == np.float32
        assert 0 <= masks.probability.min() < masks.probability.max() <= 1
        assert masks.label.dtype == np.int32
        np.testing.assert_array_equal(masks.label, masks.probability.argmax(axis=0))

    def test_a_plane_has_its_word_or_its_place(self, masks):
        np.testing.assert_array_equal(masks.plane("snow and ice"), masks.probability[1])
        np.testing.assert_array_equal(masks.plane(0), masks.probability[0])
        np.testing.assert_array_equal(list(masks), masks.probability)
        with pytest.raises(UserError, match="'snow' was not asked"):
            masks.plane("snow")

    def test_they_are_the_engines(self, segment, masks):
        request = Request(noise(40, 52), 0, tuple(WORDS))
        (answer,) = segment.segment([request], EStep(1, 1), key=0)
        np.testing.assert_array_equal(answer.stack(), masks.probability)

    def test_saved_files_and_the_overlay_tell_the_same(self, masks, tmp_path):
        written = masks.save(tmp_path / "new" / "folder", "a")
        assert all(path.is_file() for path in written)
        assert {p.name for p in written} == {p.name for p in (tmp_path / "new" / "folder").iterdir()}
        with np.load(tmp_path / "new" / "folder" / "a.npz") as stored:
            half = masks.probability.astype(np.float16)
            np.testing.assert_array_equal(stored["probability"], half)
        shown = np.asarray(Image.open(tmp_path / "new" / "folder" / "a.overlay.png"))
        np.testing.assert_array_equal(masks.overlay(), shown)
        assert masks.overlay().shape[0] > 40 and masks.overlay().shape[1] == 52


class TestAsking:
    """Every form of image and query; what cannot be asked is one line."""

    def test_a_file_a_pillow_image_and_an_array_are_one_image(self, segment, masks, tmp_path):
        Image.fromarray(noise(40, 52)).save(tmp_path / "a.png")
        for image in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(tmp_path / "a.png")):
            got = segment(image, WORDS, ensemble=1, steps=1)
            np.testing.assert_array_equal(got.probability, masks.probability)

    def test_one_word_is_a_list_of_one(self, segment):
        one = segment(noise(20, 20), "water", ensemble=1, steps=1)
        assert one.queries == ("water",) and one.probability.shape == (1, 20, 20)
        assert (one.label == 0).all()

    def test_a_seed_gives_the_same_masks_again_and_another_one_others(self, segment, masks):
        image = noise(40, 52)
        again = segment(image, WORDS, ensemble=1, steps=1, seed=0)
        other = segment(image, WORDS, ensemble=1, steps=1, seed=1)
        np.testing.assert_array_equal(again.probability, masks.probability)
        assert (other.probability != masks.probability).any()

    @pytest.mark.parametrize(
        ("image", "queries", "options", "told"),
        [
            (noise(4, 4).astype(np.float32), "a", {}, "float32[4, 4, 3]"),
            (noise(4, 4)[..., 0], "a", {}, "uint8[4, 4]"),
            ("no.png", "a", {}, "image=no.png: cannot be read: No such file"),
            (noise(4, 4), " ", {}, "queries: empty"),
            (noise(4, 4), [], {}, "no queries"),
            (noise(4, 4), ["a", "a"], {}, "asked twice"),
            (noise(4, 4), "a", {"ensemble": 0}, "ensemble=0"),
            (noise(4, 4), "a", {"steps": 1001}, "steps=1001"),
            (noise(4, 4), "a", {"spacing": "even"}, "spacing='even'"),
        ],
    )
    def test_what_cannot_be_asked_is_told(self, segment, image, queries, options, told):
        with pytest.raises(UserError) as caught:
            segment(image, queries, **({"ensemble": 1, "steps": 1} | options))
        assert told in tiny.one_line(caught.value)

    def test_progress_counts_views_and_groups_of_queries(self, segment):
        told, many = [], [f"land {i}" for i in range(20)]  # two groups
        segment(noise(20, 20), many, 1, 1, advance=lambda *numbers: told.append(numbers))
        assert told == [(1, 2), (2, 2)]


def test_the_command_line_gives_the_same_bits(segment, export, tmp_path):
    Image.fromarray(noise(40, 52)).save(tmp_path / "a.png")
    settings = sampling_settings("2x2")
    predict(None, str(export), str(tmp_path / "a.png"), WORDS, tmp_path / "out.png", settings=settings)
    masks = segment(tmp_path / "a.png", WORDS, ensemble=2, steps=2, seed=4)
    masks.save(tmp_path / "api", "out")
    files = sorted((tmp_path / "api").iterdir())
    assert len(files) == 9
    for file in files:
        if file.suffix not in (".npz", ".json"):  # a zip archive holds the time
            assert file.read_bytes() == (tmp_path / file.name).read_bytes(), file.name

    # Only the command notes what its next call needs in order to go on.
    image = tmp_path / "a.png"
    told = json.loads((tmp_path / "out.json").read_text())
    assert all(told.pop(key) for key in marks_of(image, "any"))
    assert told == json.loads((tmp_path / "api" / "out.json").read_text())
    coco = [folder / "out.coco.json" for folder in (tmp_path, tmp_path / "api")]
    assert coco[0].read_bytes() == coco[1].read_bytes()
    with np.load(tmp_path / "out.npz") as ours, np.load(tmp_path / "api" / "out.npz") as theirs:
        np.testing.assert_array_equal(ours["probability"], theirs["probability"])


class TestACopiedExport:
    """The folder of the weights is all that is needed."""

    def test_a_saved_segmenter_is_a_copy_that_answers_alike(self, segment, export, masks, tmp_path):
        folder = segment.save_pretrained(tmp_path / "copy")
        assert {p.name for p in folder.iterdir()} == {p.name for p in export.iterdir()}
        again = load_segmenter(folder)
        got = again(noise(40, 52), WORDS, ensemble=1, steps=1)
        np.testing.assert_array_equal(got.probability, masks.probability)
        again.save_pretrained(folder)  # onto itself
        assert load_segmenter(folder).description == segment.description

    def test_a_contradicting_configuration_is_refused(self, config, export):
        other = dataclasses.replace(
            config, diffusion=dataclasses.replace(config.diffusion, prediction_type="sample")
        )
        with pytest.raises(UserError, match="trained with 'v_prediction'"):
            load_segmenter(export, other)

    def test_its_parts_are_found_from_another_working_directory(self, folders, tmp_path, monkeypatch):
        shutil.copytree(folders["vae"], tmp_path / "vae")
        monkeypatch.chdir(tmp_path)
        tiny.export(tiny.config(folders, model__vae="./vae"), tmp_path / "export")
        monkeypatch.chdir("/")
        assert load_segmenter(tmp_path / "export").description.vae.reference.endswith("vae")

    @pytest.mark.usefixtures("cover")
    def test_it_evaluates_the_runs_numbers_and_leaves_the_weights_alone(self, folders, tmp_path):
        """Without a configuration: from the run, and from its export alone, under another name."""
        config = tiny.config(
            folders, eval__num_images=2, eval__calibrate_images=1, eval__calibrate=True,
            eval__batch_size=1, seed=4,
        )  # fmt: skip
        run, copy = tmp_path / "run", tmp_path / "copy"
        tiny.export(config, run / "export")
        shutil.copytree(run / "export", copy)
        whole = jobs.evaluate(run, config=config)
        alone = jobs.evaluate(tmp_path / "alone", model=str(copy))
        again = jobs.evaluate(run)
        assert whole == alone == again and whole["seed"] == 4 and whole["num_images"] == 2
        assert not (copy / "calibration.json").exists() and (run / "export/calibration.json").exists()
        assert (tmp_path / "alone" / "report" / "index.html").is_file()
        stored = json.loads((tmp_path / "alone" / "eval" / "results.json").read_text())
        assert stored == whole

        with pytest.raises(UserError, match="it holds a run"):
            jobs.evaluate(run, model=str(copy))
        with pytest.raises(UserError, match=r"config.data.image_size=64, trained with 32"):
            jobs.evaluate(tmp_path / "other", model=str(copy), settings={"data.image_size": 64})
        assert not (tmp_path / "other").exists()


@pytest.mark.usefixtures("cover")
def test_evaluation_suite_and_python_give_the_same_integers(folders, tmp_path, monkeypatch):
    """The same weights and images by the three ways, on eight devices: every count is equal."""
    from digseg_jax.evaluation import suite

    config = tiny.config(folders, eval__num_images=3, eval__batch_size=1)
    tiny.export(config, tmp_path / "export")
    monkeypatch.setitem(suite.SUITES, "deepglobe", ("landcover",))  # a suite of the data at hand
    results = jobs.evaluate(tmp_path, config=config)
    table = jobs.evaluate(tmp_path, "deepglobe", config=config)
    counts = np.array(results["confusion"])

    from digseg_jax.evaluation.examples import eval_examples

    segment = load_segmenter(tmp_path)
    examples, own = eval_examples(config.data, "test", 3), 0
    for i in range(3):
        masks = segment(examples[i]["image"], examples.classes, 1, 1, seed=config.seed, index=i)
        own = own + confusion.confusion(examples[i]["label"], masks.label, len(examples.classes))
    np.testing.assert_array_equal(own, counts)
    (row,) = table["rows"]
    exhaustive = row["protocols"]["exhaustive"]
    assert row["num_images"] == 3 and exhaustive["miou"] == results["miou"]
    journal = (tmp_path / "eval" / "journal" / "landcover_1x1.jsonl").read_text().splitlines()
    from digseg_jax.evaluation.journal import unpack

    rows = [json.loads(line) for line in journal[1:]]
    found = [r["value"]["confusion"] for r in rows if "exhaustive" in r["key"]]
    np.testing.assert_array_equal(sum(unpack(c) for c in found), counts)


def test_a_strip_that_would_be_enlarged_beyond_the_memory_is_told(folders, tmp_path):
    """Its short side of one pixel would be seen as 64: the process was killed, and its whole folder."""
    tiny.export(tiny.config(folders, eval__short_side=64), tmp_path)
    segment = load_segmenter(tmp_path)
    assert segment.mode == "window"
    with pytest.raises(UnreadableError, match="60000 x 1 pixels would be seen as 3840000 x 64 "):
        segment(np.zeros((1, 60_000, 3), np.uint8), ["sky"], ensemble=1, steps=1)


def test_a_palette_of_somebodys_own_folder_answers_without_the_folder(folders, tmp_path):
    data, weights = tmp_path / "data", tmp_path / "weights"
    (data / "images" / "train").mkdir(parents=True)
    (data / "masks" / "train").mkdir(parents=True)
    (data / "classes.txt").write_text("soil\ncrop\nweed\n")
    own = {"data__name": "folder", "data__root": str(data), "data__num_queries": 1}
    tiny.export(tiny.config(folders, model__codec="palette", **own), weights)
    shutil.rmtree(data)

    names = ["soil", "crop", "weed"]
    segment = load_segmenter(weights)
    with pytest.raises(UserError, match="'crop': this palette answers .* ask for soil, crop, weed"):
        segment(noise(32, 32), sorted(names), ensemble=1, steps=1)
    answer = segment(noise(32, 32), names, ensemble=1, steps=1)
    assert answer.probability.shape == (3, 32, 32)
    np.testing.assert_allclose(answer.probability.sum(axis=0), 1.0, rtol=1e-5)
