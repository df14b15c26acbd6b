# SPDX-License-Identifier: Apache-2.0
"""Copies of a run's weights into the package: their terms and scores go along."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest
import tiny

from digseg_jax import assets
from digseg_jax.config.parse import to_dict
from digseg_jax.io.json_file import read_json
from digseg_jax.prediction.description import FILE, read_description
from digseg_jax.prediction.export import copy_export
from digseg_jax.prediction.model_card import model_card
from digseg_jax.tools import ship_assets
from digseg_jax.weights import read_metadata

SCORES = {
    "suite": "domains",
    "seed": 5,
    "rows": [
        {"dataset": "camvid", "split": "val", "num_images": 101, "estep": "2x1", "asked_miou": 0.4321,
         "per_class": {"forest": 0.8, "barren": 0.9, "unheard": 1.0, "water": None},
         "wrong_names": {"nucleus": 0.001, "weed": 0.003}},
        {"dataset": "cells_wbc", "missing": "no such folder"},
    ],
}  # fmt: skip


def run_on(datasets: list[str], config, run: Path, change=lambda x: x) -> Path:
    """A working directory with an export that says that it was trained on these data sets."""
    tiny.export(config, run / "export", change=lambda params: jax.tree.map(change, params))
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    described = read_json(run / "export" / FILE) | {"datasets": datasets}
    (run / "export" / FILE).write_text(json.dumps(described))
    return run


@pytest.fixture
def shipped(folders, tmp_path, monkeypatch) -> Path:
    """Weights of two domains, shipped with their scores."""
    monkeypatch.setattr(ship_assets, "FOLDER", tmp_path / "assets")
    monkeypatch.setattr(assets, "FOLDER", tmp_path / "assets")
    run = run_on(["camvid", "cells_wbc"], tiny.config(folders), tmp_path / "run")
    (tmp_path / "suite_domains.json").write_text(json.dumps(SCORES))
    ship_assets.ship(run, "generalist", tmp_path / "suite_domains.json")
    return tmp_path / "assets" / "generalist"


def test_terms_of_the_data_lie_beside_the_weights_and_go_along(shipped, tmp_path):
    assert assets.terms_of(shipped).startswith("For non-commercial research only")
    assert "- camvid: CC BY-NC 4.0\n" in (shipped / "LICENSE").read_text()
    assert read_metadata(shipped)["license"] == "see LICENSE"
    copy_export(shipped, tmp_path / "copy")
    assert (tmp_path / "copy" / "LICENSE").read_text() == (shipped / "LICENSE").read_text()


def test_the_card_has_the_scores_of_the_domains_that_were_there(shipped):
    card = (shipped / "README.md").read_text()
    assert "| camvid | 101 of val | 0.432 | 0.20% |" in card
    assert "| cells_wbc" not in card and "license: other" in card


def test_the_card_says_what_works_with_these_files_and_asks_for_what_they_know(shipped):
    card = (shipped / "README.md").read_text()
    assert 'dj.load_segmenter("assets:generalist")' in card and "from_pretrained(" not in card
    assert 'segment(image, ["barren", "forest"], ' in card
    assert "For non-commercial research only" in card and "See LICENSE" in card


def test_weights_that_were_trained_on_count_the_steps_of_both_parts(shipped, folders, tmp_path):
    earlier = read_description(shipped)
    run = run_on(["camvid", "cells_wbc"], tiny.config(folders), tmp_path / "more", lambda x: x + 1)
    values = read_json(run / "export" / FILE) | {"started_from": "assets:generalist", "steps": 40}
    (run / "export" / FILE).write_text(json.dumps(values))
    ship_assets.ship(run, "generalist")
    made = read_description(shipped)
    assert made.steps == earlier.steps + 40 and made.started_from == earlier.started_from
    ship_assets.ship(run, "generalist", tmp_path / "suite_domains.json")  # again, now with scores
    assert read_description(shipped) == made
    assert "started from: assets:generalist" not in (shipped / "README.md").read_text()


def test_weights_that_start_from_them_are_under_the_same_terms(shipped, folders, tmp_path):
    run = run_on(["landcover"], tiny.config(folders), tmp_path / "next")
    values = read_json(run / "export" / FILE) | {"started_from": "assets:generalist"}
    (run / "export" / FILE).write_text(json.dumps(values))
    assert "For non-commercial research only" in model_card(read_description(run / "export"))


def test_the_package_s_own_data_need_no_license_of_their_own(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(ship_assets, "FOLDER", tmp_path / "assets")
    run = run_on(["landcover"], tiny.config(folders), tmp_path / "run")
    ship_assets.ship(run, "segmenter")
    assert not assets.terms_of(tmp_path / "assets" / "segmenter")
    assert read_metadata(tmp_path / "assets" / "segmenter")["license"] == "Apache-2.0"
