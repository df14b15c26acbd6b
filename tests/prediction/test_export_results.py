# SPDX-License-Identifier: Apache-2.0
"""What an evaluation leaves beside the weights: a trial of other settings leaves nothing."""

from __future__ import annotations

import json

import pytest
import tiny

from digseg_jax import jobs
from digseg_jax.config.parse import to_dict
from digseg_jax.io.workdir import claim
from digseg_jax.prediction import export as exports
from digseg_jax.prediction.description import read_description


@pytest.mark.usefixtures("cover")
def test_a_trial_leaves_calibration_card_and_configuration_as_they_are(folders, tmp_path):
    """Its fit on one image, or scale 2.0 without any, took the place of the one that was fitted."""
    config = tiny.config(
        folders, eval__num_images=2, eval__calibrate_images=2, eval__calibrate=True,
        eval__batch_size=1,
    )  # fmt: skip
    tiny.export(config, tmp_path / "export")
    claim(tmp_path, to_dict(config))
    jobs.evaluate(tmp_path)
    kept = [tmp_path / name for name in ("config.json", "export/calibration.json", "export/README.md")]
    index = tmp_path / "export/model_index.json"
    before = {path: path.read_bytes() for path in (*kept, index)}
    assert (
        json.loads(before[kept[1]])["split"] == "val" and b"| landcover | test | 2 |" in before[kept[2]]
    )

    few = jobs.evaluate(tmp_path, settings={"eval.num_images": 1, "eval.calibrate_images": 1})
    assert few["num_images"] == 1 and few["split_images"] > 2
    assert {path: path.read_bytes() for path in before} == before

    # Of all the images, but without a fit: the scores are written, the calibration stays.
    jobs.evaluate(tmp_path, settings={"eval.calibrate": False})
    assert {path: path.read_bytes() for path in before if path != kept[2]} == {
        path: text for path, text in before.items() if path != kept[2]
    }
    assert jobs.evaluate(tmp_path)["num_images"] == 2  # as the run was made, not as the trial


@pytest.mark.usefixtures("cover")
def test_another_export_of_the_same_checkpoint_keeps_what_was_fitted_for_it(folders, tmp_path):
    """Even after a trial, whose results are not those of the export."""
    config = tiny.config(
        folders, train__steps=1, eval__num_images=2, eval__calibrate_images=2, eval__calibrate=True,
        eval__batch_size=1,
    )  # fmt: skip
    jobs.train(config, tmp_path)
    names = ("calibration.json", "README.md", "model_index.json")
    before = {name: (tmp_path / "export" / name).read_bytes() for name in names}
    assert json.loads(before["calibration.json"])["split"] == "val"
    jobs.evaluate(tmp_path, settings={"eval.num_images": 1, "eval.calibrate": False})
    jobs.export(tmp_path)
    assert {name: (tmp_path / "export" / name).read_bytes() for name in names} == before


@pytest.mark.parametrize(
    ("used", "there", "own", "written"),
    [(8, 81, 0, False), (81, 81, 0, True), (8, 81, 8, True), (3, 3, 200, True), (8, 81, 40, False)],
)
def test_results_count_if_they_are_of_the_whole_split_or_of_the_runs_own_number(
    folders, tmp_path, used, there, own, written
):
    tiny.export(tiny.config(folders, eval__num_images=own), tmp_path)
    card = (tmp_path / exports.CARD).read_bytes()
    results = {
        "dataset": "landcover", "split": "test", "num_images": used, "split_images": there,
        "ensemble": 1, "steps": 1, "spacing": "trailing", "protocol": "", "inference": "window",
        "view_size": [32], "miou": 0.5, "accuracy": 0.6,
        "calibration": {"scale": 3.0, "bias": [0.0] * 8, "split": "val"},
        "calibration_images": used, "calibration_split_images": there,
    }  # fmt: skip
    exports.add_results(tmp_path, results)
    assert (tmp_path / exports.CALIBRATION).exists() == written
    assert ((tmp_path / exports.CARD).read_bytes() != card) == written

    # Results of earlier versions do not say of how many images they could have been.
    earlier = {k: v for k, v in results.items() if not k.endswith(("split_images", "ation_images"))}
    exports.add_results(tmp_path, earlier)
    assert (tmp_path / exports.CALIBRATION).exists()
    assert read_description(tmp_path).recorded_config().eval.num_images == own


@pytest.mark.usefixtures("cover")
def test_without_a_calibration_the_weights_have_the_scale_that_was_fitted_for_them(folders, tmp_path):
    """As in a prediction: the evaluation alone took 2.0."""
    tiny.export(tiny.config(folders, eval__num_images=1), tmp_path / "weights")
    fitted = {"scale": 6.0, "bias": [0.0] * 8, "split": "val"}
    (tmp_path / "weights" / exports.CALIBRATION).write_text(json.dumps(fitted))
    once = {"eval.calibrate": False, "eval.sweep": ()}
    results = jobs.evaluate(tmp_path / "out", model=str(tmp_path / "weights"), settings=once)
    assert results["calibration"] == {"scale": 6.0, "bias": [0.0] * 8, "split": "none"}
