# SPDX-License-Identifier: Apache-2.0
"""Evaluation: integer counts that do not depend on devices or batches, and the files it leaves."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny

from digseg_jax.data import landcover
from digseg_jax.data.landcover import GROUPS, TILE
from digseg_jax.eval_progress import Progress as Recorded
from digseg_jax.eval_progress import Shown
from digseg_jax.evaluate import Evaluator, evaluate, results_of, write_json
from digseg_jax.report import build_report
from digseg_jax.segmentation import metrics
from digseg_jax.segmentation.calibration import Calibration, identity
from digseg_jax.segmentation.inference import EStep
from digseg_jax.tasks.segmentation import SegmentationTask
from digseg_jax.writers import METRICS_NAME

IMAGES = 5  # on two devices and on eight the last batch is not full
pytestmark = pytest.mark.usefixtures("cover")


@pytest.fixture(scope="module")
def config(folders):
    # one image a device, so that every mesh runs the same program and not even rounding differs
    return tiny.config(folders, eval__num_images=IMAGES, eval__batch_size=1)


@pytest.fixture(scope="module")
def task(config):
    return SegmentationTask(config)


@pytest.fixture(scope="module")
def params(task):
    return jax.tree.map(jax.numpy.asarray, task.initial())


def scores(config, task, params, devices=1, *, keep=0, estep=None, calibration=None, axes=None):
    evaluator = Evaluator(config, task, tiny.mesh(**(axes or {"data": devices})))
    tiles = evaluator.examples("test")
    return evaluator.scores(
        params, tiles, evaluator.bank(GROUPS), estep or EStep(1, 1),
        calibration or identity(len(GROUPS)), keep=keep,
    )  # fmt: skip


@pytest.fixture(scope="module")
def one_device(config, task, params):
    return scores(config, task, params, keep=3)


def test_every_pixel_is_counted_once(one_device):
    pixels = TILE * TILE
    assert one_device.confusion.sum() == IMAGES * pixels
    assert one_device.overlaps.shape == (IMAGES, 8, 8) and one_device.areas.shape == (IMAGES, 8)
    np.testing.assert_array_equal(one_device.areas.sum(axis=1), pixels)
    assert len(one_device.names) == IMAGES


def test_the_true_areas_are_the_tiles_own(one_device, config, task):
    tiles = Evaluator(config, task, tiny.mesh()).examples("test")
    for i in range(IMAGES):
        expected = np.bincount(tiles[i]["label"].ravel(), minlength=8)
        np.testing.assert_array_equal(one_device.areas[i], expected)
        assert one_device.names[i] == tiles[i]["name"]
    np.testing.assert_array_equal(one_device.confusion.sum(axis=1), one_device.areas.sum(axis=0))


def test_a_validation_that_comes_again_compiles_nothing(config, task, params, one_device, monkeypatch):
    evaluator = Evaluator(config, task, tiny.mesh())
    tiles, bank = evaluator.examples("test"), evaluator.bank(GROUPS)
    arguments = (params, tiles, bank, EStep(1, 1), identity(len(GROUPS)))
    first = evaluator.scores(*arguments)
    monkeypatch.setattr(evaluator, "jit", lambda *_, **__: pytest.fail("made another program"))
    again = evaluator.scores(*arguments)
    for found in (first, again):
        np.testing.assert_array_equal(found.confusion, one_device.confusion)


@pytest.mark.parametrize("devices", [2, 8])
def test_any_number_of_devices_gives_the_same_integers(devices, config, task, params, one_device):
    got = scores(config, task, params, devices)
    np.testing.assert_array_equal(got.confusion, one_device.confusion)
    np.testing.assert_array_equal(got.overlaps, one_device.overlaps)
    np.testing.assert_array_equal(got.areas, one_device.areas)
    assert got.names == one_device.names


def test_a_batch_of_two_with_a_padded_end_counts_the_same(config, task, params, one_device):
    """Another program rounds otherwise: a few pixels of this untrained model are near ties."""
    twos = dataclasses.replace(config, eval=dataclasses.replace(config.eval, batch_size=2))
    got = scores(twos, task, params)
    np.testing.assert_array_equal(got.areas, one_device.areas)
    np.testing.assert_array_equal(got.confusion.sum(axis=1), one_device.confusion.sum(axis=1))
    assert np.abs(got.confusion - one_device.confusion).sum() <= 20
    assert np.abs(got.overlaps - one_device.overlaps).sum() <= 20


def test_masks_denoised_a_few_at_a_time_count_the_same(config, folders, params, one_device):
    few = dataclasses.replace(config, model=dataclasses.replace(config.model, unet_limit=3))
    got = scores(few, SegmentationTask(few), params)
    np.testing.assert_array_equal(got.areas, one_device.areas)
    assert np.abs(got.confusion - one_device.confusion).sum() <= 20


def test_probabilities_are_kept_for_some_images_and_explain_the_counts(one_device, config, task):
    assert len(one_device.probability) == 3
    tiles = Evaluator(config, task, tiny.mesh()).examples("test")
    for i, probability in one_device.probability.items():
        assert probability.shape == (8, TILE, TILE)
        assert probability.min() >= 0 and probability.max() <= 1
        label = tiles[i]["label"]
        expected = [[((label == c) & (mask > 0.5)).sum() for c in range(8)] for mask in probability]
        np.testing.assert_array_equal(one_device.overlaps[i], expected)


def test_a_bias_moves_the_argmax_and_leaves_single_queries_alone(config, task, params, one_device):
    bias = [0.0] * 8
    bias[5] = 50.0
    got = scores(config, task, params, calibration=Calibration(2.0, tuple(bias), "val"))
    assert got.confusion[:, 5].sum() == IMAGES * TILE * TILE
    np.testing.assert_array_equal(got.overlaps, one_device.overlaps)


def test_the_images_of_a_smaller_evaluation_are_spread_over_the_split(config, task, cover):
    every = [t.name for t in cover.tiles("test")]
    few = [e["name"] for e in Evaluator(config, task, tiny.mesh()).examples("test")]
    assert len(few) == IMAGES and few == sorted(few)
    places = [every.index(name) for name in few]
    assert np.diff(places).min() >= len(every) // IMAGES
    none_said = dataclasses.replace(config, eval=dataclasses.replace(config.eval, num_images=0))
    assert len(Evaluator(none_said, task, tiny.mesh()).examples("test")) == len(every)


def test_queries_must_match_the_classes(config, task, params):
    evaluator = Evaluator(config, task, tiny.mesh())
    tiles, bank = evaluator.examples("test"), evaluator.bank(["water", "forest"])
    with pytest.raises(ValueError, match="2 queries for 8 classes"):
        evaluator.scores(params, tiles, bank, EStep(1, 1), identity(8))


def test_calibration_never_sees_the_split_that_is_scored(folders, task, params):
    config = tiny.config(folders, eval__num_images=2, eval__calibrate=True)
    evaluator = Evaluator(config, task, tiny.mesh())
    fitted = evaluator.calibrate(params, evaluator.bank(GROUPS), EStep(1, 1))
    assert fitted.split == "val" and len(fitted.bias) == 8


@pytest.fixture(scope="module")
def run(folders, task, params, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    config = tiny.config(
        folders, eval__num_images=3, eval__gallery=2, eval__ensemble=2,
        eval__estep=("1x1", "2x1:leading"), eval__calibrate=True, seed=0,
    )  # fmt: skip
    return workdir, evaluate(config, task, params, tiny.mesh(), workdir)


class TestFiles:
    """What `evaluate` writes, and that the report is made of it."""

    def test_results_have_the_promised_keys(self, run):
        workdir, results = run
        stored = json.loads((workdir / "eval" / "results.json").read_text())
        assert stored == results
        promised = {"dataset", "split", "protocol", "num_images", "miou", "per_class", "ensemble",
                    "steps", "seed"}  # fmt: skip
        assert promised <= stored.keys()
        assert stored["dataset"] == "landcover" and stored["split"] == "test"
        numbers = [stored[k] for k in ("num_images", "ensemble", "steps", "seed")]
        assert numbers == [3, 2, 1, 0]
        assert tuple(stored["per_class"]) == GROUPS
        assert "held-out" in stored["protocol"]

    def test_scores_follow_from_the_stored_counts(self, run):
        results = run[1]
        counts = np.array(results["confusion"])
        assert results["miou"] == metrics.mean_iou(counts)
        assert results["accuracy"] == metrics.pixel_accuracy(counts)
        defined = [v for v in results["per_class"].values() if v is not None]
        assert results["miou"] == pytest.approx(np.mean(defined))

    def test_the_estep_table_has_its_rows(self, run):
        rows = json.loads((run[0] / "eval" / "estep.json").read_text())["rows"]
        assert [(r["ensemble"], r["steps"], r["spacing"]) for r in rows] == [
            (1, 1, "trailing"), (2, 1, "leading"),
        ]  # fmt: skip
        assert all(r["queries_per_second"] > 0 and 0 <= r["miou"] <= 1 for r in rows)

    def test_every_estep_is_calibrated_with_its_own_members(self, run, folders, task, params):
        """Biases of one member would favour rows of one; see `Evaluator.calibrate`."""
        workdir, results = run
        rows = json.loads((workdir / "eval" / "estep.json").read_text())["rows"]
        fits = [results["calibration"], *(row["calibration"] for row in rows)]
        config = tiny.config(folders, eval__num_images=3)
        evaluator = Evaluator(config, task, tiny.mesh())
        bank = evaluator.bank(GROUPS)
        for text, fitted in zip(("2x1", "1x1", "2x1:leading"), fits, strict=True):
            assert fitted == evaluator.calibrate(params, bank, EStep.parse(text)).to_dict()
        assert fits[0] != fits[1] and fits[0] != fits[2]

    def test_the_gallery_shows_the_first_images_with_their_present_classes(self, run):
        gallery = json.loads((run[0] / "eval" / "gallery" / "gallery.json").read_text())
        assert len(gallery["items"]) == 2
        for item in gallery["items"]:
            assert (run[0] / "eval" / "gallery" / item["image"]).is_file()
            assert item["queries"] and {q["name"] for q in item["queries"]} <= set(GROUPS)

    def test_the_report_is_built_from_it(self, run):
        workdir = run[0]
        (workdir / METRICS_NAME).write_text('{"step": 1, "loss": 0.5, "images_per_second": 2.0}\n')
        assert build_report(workdir).is_file()


class Killed(BaseException):
    """Ends an evaluation as a signal would."""


def files(workdir):
    """Everything that must be the same after a kill."""
    folder = workdir / "eval"
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name not in ("speed.json", "estep.json")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


@pytest.mark.parametrize("survived", [0, 1, 2])
def test_a_killed_evaluation_goes_on_and_ends_with_the_same_files(
    folders, task, params, run, tmp_path, monkeypatch, survived
):
    config = tiny.config(folders, eval__num_images=3, eval__gallery=2, eval__batch_size=1)
    whole = evaluate(config, task, params, tiny.mesh(), tmp_path / "whole")
    record, finished = Recorded.record, []

    def dies(self, key, counts):
        if len(finished) == survived:
            raise Killed
        record(self, key, counts)
        finished.append(key)

    monkeypatch.setattr(Recorded, "record", dies)
    with pytest.raises(Killed):
        evaluate(config, task, params, tiny.mesh(), tmp_path / "killed")
    assert not (tmp_path / "killed" / "eval" / "results.json").exists()
    monkeypatch.setattr(Recorded, "record", lambda self, key, c: (finished.append(key),
                                                                  record(self, key, c)))  # fmt: skip
    assert evaluate(config, task, params, tiny.mesh(), tmp_path / "killed") == whole
    assert len(finished) == len(set(finished)) == 3, "no batch is counted twice"
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert "results.md" in files(tmp_path / "whole")


class TestShown:
    """Which images the gallery shows."""

    def choose(self, scores, count):
        shown = Shown(count, len(scores), Recorded(None, ""))
        for i, score in enumerate(scores):
            shown.offer(i, score, lambda i=i: np.full(1, i))
        return shown.final()

    def test_the_worst_and_the_best_are_among_them(self):
        scores = np.random.default_rng(0).random(50).tolist()
        scores[7] = float("nan")
        masks, notes = self.choose(scores, 12)
        order = sorted((i for i in range(50) if i != 7), key=scores.__getitem__)
        assert {i for i, n in notes.items() if "worst" in n} == set(order[:3])
        assert {i for i, n in notes.items() if "best" in n} == set(order[-3:])
        assert set(notes) <= set(masks) and {0, 8, 16, 25, 33, 41} <= set(masks)
        assert all(m == i for i, m in masks.items())

    def test_a_small_gallery_is_spread_and_an_empty_one_empty(self):
        assert set(self.choose([0.5] * 9, 3)[0]) == {0, 3, 6}
        assert self.choose([0.5] * 9, 0) == ({}, {})


def test_a_class_without_a_score_is_null_not_nan(config, one_device):
    absent = dataclasses.replace(one_device, confusion=one_device.confusion.copy())
    absent.confusion[5] = absent.confusion[:, 5] = 0
    results = results_of(absent, config, identity(8), EStep(1, 1))
    assert results["per_class"]["urban"] is None
    json.dumps(results, allow_nan=False)


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_the_second_label_set_has_its_own_queries(folders, task, params):
    config = tiny.config(folders, data__label_set="igbp", eval__num_images=1, eval__batch_size=1)
    evaluator = Evaluator(config, task, tiny.mesh())
    tiles, bank = evaluator.examples("val"), evaluator.bank(landcover.IGBP)
    got = evaluator.scores(params, tiles, bank, EStep(1, 1), identity(17))
    assert got.confusion.shape == (17, 18) and got.confusion.sum() == TILE * TILE
