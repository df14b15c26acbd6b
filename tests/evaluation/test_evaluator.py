# SPDX-License-Identifier: Apache-2.0
"""Evaluation: integer counts that do not depend on devices or batches, and the files it leaves."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from digseg_jax.config.sampling import EStep
from digseg_jax.data.datasets import landcover
from digseg_jax.data.datasets.landcover import GROUPS, TILE
from digseg_jax.evaluation.evaluator import Evaluator
from digseg_jax.evaluation.examples import eval_examples
from digseg_jax.evaluation.job import _write_files, evaluate, results_of
from digseg_jax.evaluation.journal import Journal
from digseg_jax.io.metric_writer import METRICS_NAME
from digseg_jax.metrics import confusion as metrics
from digseg_jax.prediction.segmenter import Segmenter
from digseg_jax.report import build_report
from digseg_jax.segmentation.calibration import Calibration, identity
from digseg_jax.training.tasks.segmentation import SegmentationTask

IMAGES = 5  # on two devices and on eight the last batch is not full
ONE = EStep(1, 1)
pytestmark = pytest.mark.usefixtures("cover")


@pytest.fixture(scope="module")
def config(folders):
    # one view a device, so that every mesh runs the same program and not even rounding differs
    return tiny.config(folders, eval__num_images=IMAGES, eval__batch_size=1)


@pytest.fixture(scope="module")
def task(config):
    return SegmentationTask(config)


@pytest.fixture(scope="module")
def params(task):
    return task.initial()


def evaluator(config, task, params, axes=None, split="test"):
    segmenter = Segmenter(task, params, config.eval, mesh=tiny.mesh(**(axes or {})))
    examples = eval_examples(config.data, split, config.eval.num_images)
    return Evaluator(segmenter, examples, config.eval, seed=config.seed)


@pytest.fixture(scope="module")
def one_device(config, task, params):
    return evaluator(config, task, params)


@pytest.fixture(scope="module")
def scores(one_device):
    return one_device.scores(ONE)


def same(a, b):
    for name in ("confusion", "overlaps", "areas"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def test_every_pixel_is_counted_once(scores):
    assert scores.confusion.sum() == IMAGES * TILE * TILE
    assert scores.overlaps.shape == (IMAGES, 8, 8) and scores.areas.shape == (IMAGES, 8)
    np.testing.assert_array_equal(scores.areas.sum(axis=1), TILE * TILE)


def test_the_true_areas_are_the_tiles_own(scores):
    for i in range(IMAGES):
        expected = np.bincount(scores.examples[i]["label"].ravel(), minlength=8)
        np.testing.assert_array_equal(scores.areas[i], expected)
    np.testing.assert_array_equal(scores.confusion.sum(axis=1), scores.areas.sum(axis=0))


def test_the_counts_are_those_of_the_masks_that_python_gets(one_device, scores):
    """One engine: `predict_masks` and the evaluation give the same integers."""
    for i in range(IMAGES):
        example = scores.examples[i]
        masks = one_device.segmenter.predict_masks(
            [example["image"]], GROUPS, ensemble=1, steps=1, first=i
        )[0]
        counts = metrics.confusion(example["label"], masks.argmax(axis=0), 8)
        one = dataclasses.replace(scores, rows=(scores.rows[i],))
        np.testing.assert_array_equal(one.confusion, counts)


def test_what_comes_again_compiles_nothing(one_device, scores):
    before = one_device.segmenter.programs.compiled
    same(one_device.scores(ONE), scores)
    assert one_device.segmenter.programs.compiled == before


@pytest.mark.parametrize("axes", [{"data": 2}, {"data": 2, "fsdp": 4}])
def test_any_number_of_devices_gives_the_same_integers(config, task, params, scores, axes):
    same(evaluator(config, task, params, axes).scores(ONE), scores)


def test_a_batch_of_two_with_a_padded_end_counts_the_same(config, task, params, scores):
    """Another program rounds otherwise: a few pixels of this untrained model are near ties."""
    twos = dataclasses.replace(config, eval=dataclasses.replace(config.eval, batch_size=2))
    got = evaluator(twos, task, params).scores(ONE)
    np.testing.assert_array_equal(got.areas, scores.areas)
    np.testing.assert_array_equal(got.confusion.sum(axis=1), scores.confusion.sum(axis=1))
    assert np.abs(got.confusion - scores.confusion).sum() <= 20
    assert np.abs(got.overlaps - scores.overlaps).sum() <= 20


def test_masks_denoised_a_few_at_a_time_count_the_same(config, params, scores):
    few = dataclasses.replace(config, compute=dataclasses.replace(config.compute, unet_batch=3))
    got = evaluator(few, SegmentationTask(few), params).scores(ONE)
    np.testing.assert_array_equal(got.areas, scores.areas)
    assert np.abs(got.confusion - scores.confusion).sum() <= 20


def test_a_bias_moves_the_argmax_and_leaves_single_queries_alone(one_device, scores):
    bias = [0.0] * 8
    bias[5] = 50.0
    got = one_device.scores(ONE, Calibration(2.0, tuple(bias), "val"))
    assert got.confusion[:, 5].sum() == IMAGES * TILE * TILE
    np.testing.assert_array_equal(got.overlaps, scores.overlaps)


def test_the_images_of_a_smaller_evaluation_are_spread_over_the_split(config, cover):
    every = [t.name for t in cover.tiles("test")]
    examples = eval_examples(config.data, "test", IMAGES)
    few = [examples[i]["name"] for i in range(len(examples))]
    assert len(few) == IMAGES and few == sorted(few)
    assert np.diff([every.index(name) for name in few]).min() >= len(every) // IMAGES
    assert len(eval_examples(config.data, "test")) == len(every)


def test_queries_must_match_the_classes(one_device):
    with pytest.raises(ValueError, match="2 queries for 8 classes"):
        Evaluator(
            one_device.segmenter, one_device.examples, one_device.settings,
            seed=0, prompts=("water", "forest"),
        )  # fmt: skip


def test_calibration_never_sees_the_split_that_is_scored(config, one_device):
    fitted = one_device.calibrate(ONE, eval_examples(config.data, "val", 2))
    assert fitted.split == "val" and len(fitted.bias) == 8
    with pytest.raises(ValueError, match="the split that is scored"):
        one_device.calibrate(ONE, eval_examples(config.data, "test", 2))


def test_another_class_list_has_its_own_queries(config, one_device):
    data = dataclasses.replace(config.data, name="landcover_igbp")
    examples = eval_examples(data, "val", 1)
    assert examples.classes == landcover.IGBP
    got = Evaluator(one_device.segmenter, examples, config.eval, seed=0).scores(ONE)
    assert got.confusion.shape == (17, 18) and got.confusion.sum() == TILE * TILE


def test_a_class_without_a_score_is_null_not_nan(config, one_device, scores):
    class Absent(type(scores)):
        confusion = scores.confusion.copy()

    Absent.confusion[5] = Absent.confusion[:, 5] = 0
    absent = Absent(scores.examples, scores.protocol, scores.rows)
    results = results_of(absent, one_device, "landcover", identity(8), ONE)
    assert results["per_class"]["urban"] is None
    json.dumps(results, allow_nan=False)


@pytest.fixture(scope="module")
def run(folders, task, params, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    config = tiny.config(
        folders, eval__num_images=3, eval__ensemble=2,
        eval__sweep=("1x1", "2x1:leading"), eval__calibrate=True, eval__decoder="vae", seed=0,
    )  # fmt: skip
    return workdir, evaluate(config.data, config.eval, config.seed, task, params, tiny.mesh(), workdir)


class TestFiles:
    """What `evaluate` writes, and that the report is made of it."""

    def test_results_have_the_promised_keys(self, run):
        workdir, results = run
        stored = json.loads((workdir / "eval" / "results.json").read_text())
        assert stored == results
        promised = {"dataset", "split", "protocol", "num_images", "miou", "per_class", "ensemble",
                    "steps", "seed", "inference", "view_size", "short_side", "decoder"}  # fmt: skip
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
        """Biases of one member would favor rows of one; see `Evaluator.calibrate`."""
        workdir, results = run
        rows = json.loads((workdir / "eval" / "estep.json").read_text())["rows"]
        fits = [results["calibration"], *(row["calibration"] for row in rows)]
        config = tiny.config(folders, eval__num_images=3, eval__decoder="vae")
        alone = evaluator(config, task, params)
        fitted_on = eval_examples(config.data, "val", 3)
        for text, fitted in zip(("2x1", "1x1", "2x1:leading"), fits, strict=True):
            assert fitted == alone.calibrate(EStep.parse(text), fitted_on).to_dict()
        assert fits[0] != fits[1] and fits[0] != fits[2]

    def test_the_gallery_shows_images_with_their_present_classes(self, run):
        gallery = json.loads((run[0] / "eval" / "gallery" / "gallery.json").read_text())
        assert len(gallery["items"]) == 3
        for item in gallery["items"]:
            assert (run[0] / "eval" / "gallery" / item["image"]).is_file()
            assert item["queries"] and {q["name"] for q in item["queries"]} <= set(GROUPS)

    def test_nothing_unfinished_is_left(self, run):
        assert not (run[0] / "eval" / "unfinished").exists()

    def test_the_report_is_built_from_it(self, run):
        workdir = run[0]
        (workdir / METRICS_NAME).write_text('{"step": 1, "loss": 0.5, "images_per_second": 2.0}\n')
        assert build_report(workdir).is_file()


def test_a_table_of_an_earlier_evaluation_goes_with_its_results(tmp_path):
    scores = SimpleNamespace(speed=dict)
    results = {
        "dataset": "a", "split": "test", "num_images": 1, "ensemble": 1, "steps": 1, "seed": 0,
        "protocol": "", "templates": [], "inference": "whole", "view_size": [8, 8], "per_class": {},
    }  # fmt: skip
    row = {"ensemble": 1, "steps": 1, "miou": 0.5}
    for rows, there in (([row], True), ([], False), ([], False), ([row], True)):
        _write_files(tmp_path, results, rows, scores, {})
        assert (tmp_path / "estep.json").exists() == there
        assert (tmp_path / "results.json").exists()


class Killed(BaseException):
    """Ends an evaluation as a signal would."""


def files(workdir):
    """Everything that must be the same after a kill."""
    folder = workdir / "eval"
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name not in ("speed.json", "estep.json")]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


@pytest.fixture(scope="module")
def whole(folders, task, params, tmp_path_factory):
    """An evaluation that was left alone: its configuration, folder and results."""
    config = tiny.config(folders, eval__num_images=3, eval__batch_size=1)
    workdir = tmp_path_factory.mktemp("whole")
    settings = config.data, config.eval, config.seed
    return settings, workdir, evaluate(*settings, task, params, tiny.mesh(), workdir)


@pytest.mark.parametrize("survived", [0, 1, 2])
def test_a_killed_evaluation_goes_on_and_ends_with_the_same_files(
    whole, task, params, tmp_path, monkeypatch, survived
):
    settings, left_alone, results = whole
    add, finished = Journal.add, []

    def dies(self, key, value):
        if len(finished) == survived:
            raise Killed
        add(self, key, value)
        finished.append(key)

    monkeypatch.setattr(Journal, "add", dies)
    with pytest.raises(Killed):
        evaluate(*settings, task, params, tiny.mesh(), tmp_path)
    assert not (tmp_path / "eval" / "results.json").exists()
    monkeypatch.setattr(
        Journal, "add", lambda self, key, value: (finished.append(key), add(self, key, value))
    )
    assert evaluate(*settings, task, params, tiny.mesh(), tmp_path) == results
    counted = [key for key in finished if key != "prompts"]
    assert len(counted) == len(set(counted)) == 3, "no image is counted twice"
    assert files(tmp_path) == files(left_alone)
    assert "results.md" in files(left_alone)
