# SPDX-License-Identifier: Apache-2.0
"""What the report claims: of which weights, of which data, and of which numbers."""

from __future__ import annotations

import html
import json
import re

import pytest
import tiny
from synthetic_run import dump, results, suite_results, weights

from digseg_jax import jobs
from digseg_jax.config.schema import DataConfig
from digseg_jax.data.datasets.registry import title
from digseg_jax.errors import UserError
from digseg_jax.evaluation.job import folder_title
from digseg_jax.report import build_report
from digseg_jax.report.suites import suite_tables

DOMAIN = {
    "suite": "domains", "dataset": "2021", "estep": "1x1", "metric": "asked", "split": "val",
    "num_images": 3, "scored": 1, "asked_miou": 0.625, "headline_protocol": "exhaustive",
    "images_per_second": 1234.5, "templates": ["{}"], "inference": "window", "view_size": [128, 128],
    "short_side": 128, "per_class": {"background": 0.9, "nucleus": 0.625, "membrane": 0.0},
    "scored_classes": ["nucleus"],
}  # fmt: skip


def write(workdir, **changes):
    dump(workdir / "eval" / "results.json", results(**changes))
    return workdir


def said(workdir) -> str:
    """The page's text between its tags, on one line."""
    text = build_report(workdir).read_text(encoding="utf-8").partition("<body>")[2]
    text = re.sub(r"<(script|style).*?</\1>", " ", text, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", text)).split())


def domains(**changes):
    return {"suite": "domains", "seed": 0, "rows": [DOMAIN | changes]}


def test_a_suite_of_other_weights_is_no_part_of_the_report(tmp_path):
    write(tmp_path)
    suite = suite_results()
    for facts, shown in (
        (weights(), True),
        (weights(versions={"jax": "0.1"}), True),  # written by another version, of the same weights
        (weights(steps=10, checkpoint="checkpoints/10"), False),
        (weights(parts={"vae": "2" * 64, "text": "1" * 64}), False),
        ({"datasets": ["landcover"], "steps": 4000, "started_from": "assets:prior"}, True),
    ):
        dump(tmp_path / "eval" / "suite_open_vocab.json", suite | {"weights": facts})
        assert ("The paper's benchmarks" in said(tmp_path)) == shown, facts


def test_what_is_not_known_of_a_suites_weights_hides_nothing(tmp_path):
    write(tmp_path)
    dump(tmp_path / "eval" / "suite_open_vocab.json", suite_results())
    assert "The paper's benchmarks" in said(tmp_path)


def test_domains_are_not_the_papers(tmp_path):
    write(tmp_path)
    dump(tmp_path / "eval" / "suite_domains.json", domains())
    text = said(tmp_path)
    assert "The paper's benchmarks" not in text
    assert "Domains Data sets of several domains, measured by this run" in text
    dump(tmp_path / "eval" / "suite_open_vocab.json", suite_results())
    assert "The paper's benchmarks" in said(tmp_path)


def test_a_suite_builds_the_report_of_a_run_again(tmp_path, monkeypatch):
    write(tmp_path)
    page = build_report(tmp_path)
    assert "Domains" not in page.read_text()

    def run_suite(*arguments):
        dump(tmp_path / "eval" / "suite_domains.json", domains())
        return domains()

    description = type("Description", (), {"provenance": lambda self: {}})()
    for name, value in {
        "find_export": lambda place: tmp_path, "read_description": lambda folder: description,
        "check_agreement": lambda *_: None, "with_settings": lambda config, _: config,
        "load_segmenter": lambda *_: type("Loaded", (), dict.fromkeys(("task", "mesh"), None) | {
            "programs": type("Programs", (), {"params": None})})(),
        "check_evaluation": lambda *_: None, "use_compile_cache": lambda _: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(jobs, name, value)
    monkeypatch.setattr(jobs.suite_lib, "check_data", lambda *_: [])
    monkeypatch.setattr(jobs.suite_lib, "run_suite", run_suite)
    (tmp_path / "export").mkdir()
    jobs.evaluate(tmp_path, "domains", config=jobs.Config())
    assert "mean IoU (classes: 1" in page.read_text()

    # Without results of the run itself there is no page to build.
    (tmp_path / "eval" / "results.json").unlink()
    page.unlink()
    jobs.evaluate(tmp_path, "domains", config=jobs.Config())
    assert not page.exists()


@pytest.mark.parametrize(("dataset", "shown"), [("2021", "2021"), ("²", "²"), ("1.5", "1.5")])
def test_a_data_set_may_be_called_by_a_number(dataset, shown):
    row = suite_tables(domains(dataset=dataset))["scores"].rows[0]
    assert row[1] == shown and row[7].value == 62.5 and row[9].value == 1234


def test_a_high_rate_is_written_in_digits():
    suite = suite_results()
    for scores in suite["rows"][0]["protocols"].values():
        scores["queries_per_second"] = 12_345.6
    table = suite_tables(suite)["scores"]
    assert table.rows[0][-1].value == 12346 and table.numeric[-1]


def test_bars_are_of_the_classes_that_are_scored():
    assert suite_tables(domains())["rows"][0]["bars"] == [("nucleus", 0.625)]
    old = {key: value for key, value in DOMAIN.items() if key != "scored_classes"}
    bars = suite_tables({"suite": "domains", "seed": 0, "rows": [old]})["rows"][0]["bars"]
    assert bars == [("nucleus", 0.625), ("membrane", 0.0)]  # a background is never asked for


@pytest.mark.parametrize(
    ("right", "wrong", "less"),
    [(0.6, 0.1, "6.0 times less"), (0.1, 0.2, ""), (0.2, 0.2, ""), (0.201, 0.2, ""), (0.6, 0.0, "")],
)
def test_a_wrong_word_is_said_to_find_less_only_if_it_does(tmp_path, right, wrong, less):
    text = said(write(tmp_path, matching_iou=right, wrong_query_iou=wrong))
    assert less in text if less else "times less" not in text


def test_a_gate_is_said_to_count_what_it_left_out_as_empty(tmp_path):
    told = "its mask counts as empty"
    assert told not in said(write(tmp_path))
    assert told in said(write(tmp_path, protocol="ade20k_847: counts pooled, gated queries"))


def test_the_folder_that_is_scored_has_its_own_name(tmp_path):
    """Weights record only that their folder was one of the user's own: it may be the same one."""
    facts = weights(datasets=["folder"])
    text = said(write(tmp_path, dataset="folder", title="leaves B", weights=facts))
    assert "split of leaves B (seed" in text and "not on this data set" not in text
    assert "trained on a user's own folder, for" in text
    assert "trained on folder" not in text and "trained on leaves" not in text


def test_a_run_that_is_scored_on_another_folder_says_so(tmp_path):
    write(tmp_path, dataset="folder", title="leaves B", weights=weights(datasets=["folder"]))
    dump(tmp_path / "config.json", {"data": {"name": "folder", "root": "/home/me/leaves A"}})
    text = said(tmp_path)
    assert "split of leaves B (seed" in text
    assert "trained on leaves A, not on this data set, for" in text


def test_a_folder_of_a_mixture_is_not_named_after_the_scored_one(tmp_path):
    write(tmp_path, dataset="folder", title="leaves", weights=weights(datasets=["folder", "camvid"]))
    dump(tmp_path / "config.json", {"data": {"root": "/d/leaves", "mixture": [{"name": "folder"}]}})
    text = said(tmp_path)
    assert "trained on a user's own folder, camvid, for" in text


def test_results_tell_which_folder_was_scored():
    assert folder_title(DataConfig("folder", "/home/me/my leaves/")) == {"title": "my leaves"}
    assert folder_title(DataConfig("camvid", "/data/camvid")) == {}
    assert title("folder", "/home/me/my leaves/") == "my leaves"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("bench/b.json", {"title": "x", "columns": ["a", "b"], "rows": [[1, 2], [3]]}),
        ("bench/b.json", {"title": "x", "columns": ["a"], "rows": [[1, 2], [3, 4]]}),
        ("bench/b.json", {"title": "x", "columns": 3, "rows": [[1]]}),
        ("eval/results.json", results(confusion=[[1, 2], [3]])),
        ("eval/results.json", results(confusion=[["a"]])),
        ("eval/results.json", results(ensemble="many")),
        ("eval/suite_open_vocab.json", {"suite": "open_vocab", "rows": [{}]}),
        ("eval/suite_open_vocab.json", {"suite": "domains", "rows": 3}),
    ],
)
def test_a_file_of_another_form_is_named_in_one_line(tmp_path, path, value):
    write(tmp_path)
    dump(tmp_path / path, value)
    with pytest.raises(UserError, match="is not of the expected form") as caught:
        build_report(tmp_path)
    assert str(tmp_path / path) in tiny.one_line(caught.value)


def test_what_was_not_measured_is_a_dash_or_nothing(tmp_path):
    """Where no pixel is labeled, and where every class is there, scores are null."""
    write(tmp_path, miou=None, accuracy=None, absent_rate=None)
    text = said(tmp_path)
    assert "mean IoU–" in text and "Pixel accuracy" not in text and "Absent class" not in text
    assert json.loads((tmp_path / "eval" / "results.json").read_text())["accuracy"] is None
