# SPDX-License-Identifier: Apache-2.0
"""Rows of a suite: which settings count, why a row has no score, and what enters the mean."""

from __future__ import annotations

import dataclasses
import json
import logging

import numpy as np
import pytest
import tiny
from perfect import Reader
from test_domains import Seen, write
from test_suite import PARAMS, colors, config, phenobench, run

from digseg_jax import jobs
from digseg_jax.config.parse import parse, to_dict
from digseg_jax.data.datasets.domains import DOMAINS
from digseg_jax.errors import UserError
from digseg_jax.evaluation import suite, suite_tables
from digseg_jax.evaluation.tables import results_markdown
from digseg_jax.report.domains import build_domain_pages
from digseg_jax.report.sections import headline
from digseg_jax.segmentation.palette import PaletteCodec

CLASSES = "0: background\n1: cytoplasm\n2: nucleus\n"


def test_settings_that_a_suite_does_not_use_are_told(caplog):
    given = {"eval.sweep": ("4x2",), "eval.split": "val", "eval.calibrate_split": "train"}
    unused = {"domains": ["sweep", "calibrate_split"], "semantic": ["split", "calibrate_split"]}
    unused["driving"] = ["sweep", "split", "calibrate_split"]
    with caplog.at_level(logging.INFO):
        for name, keys in unused.items():
            caplog.clear()
            assert suite.used_settings(name, given)["eval.calibrate"] is False
            (line,) = caplog.messages
            assert line == f"--suite={name} does not use {', '.join(f'config.eval.{k}' for k in keys)}"
        caplog.clear()
        suite.used_settings("domains", {"eval.split": "val", "eval.calibrate": False})
        assert not caplog.messages


def test_a_suite_fits_no_calibration_so_any_split_may_be_scored(folders, tmp_path):
    """eval.split=val was refused: a calibration would be fitted on it, which no suite does."""
    tiny.export(tiny.config(folders, eval__calibrate=True), tmp_path / "weights")
    with pytest.raises(UserError, match="no data set of it .* can be scored"):
        jobs.evaluate(
            tmp_path / "out", "medical", model=str(tmp_path / "weights"),
            settings={"eval.split": "val", "data.root": str(tmp_path)},
        )  # fmt: skip


class Palette(Reader):
    """As weights of a palette: only its own number of classes is answered, whatever their names."""

    def segment(self, requests, estep, **options):
        for request in requests:
            self.task.codec.check_queries(request.queries)
        return super().segment(requests, estep, **options)


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (("soil", "crop", "weed"), ""),
        (("soil", "weed", "crop"), "their own 3 classes alone, in their own order"),
        (("soil", "crop", "road"), "their own 3 classes alone, which lack weed"),
        (("land", "sea"), "their own 2 classes alone, which lack soil, crop, weed"),
    ],
)
def test_a_palette_is_scored_on_its_own_classes_only(tmp_path, answers, reason):
    """Another number of classes ended the suite; as many others were scored against wrong ones."""
    phenobench(tmp_path)
    settings = config(tmp_path)
    palette = Palette(colors().read, codec=PaletteCodec(len(answers)))
    palette.seen_at = lambda side: palette
    own = settings.data, settings.eval, settings.seed
    done = [*own, palette, PARAMS, tmp_path / "out", "all", to_dict(settings), None, answers]
    if reason:
        with pytest.raises(UserError, match="can be scored"):
            suite.run_suite(*done)
        with pytest.raises(UserError, match="can be scored"):
            suite.check_data("phenobench", *own[:2], answers)
        opened = next(s for s in suite._subjects(*own[:2], "all") if s.name == "phenobench").examples()
        with pytest.raises(UserError, match=reason):
            suite._answerable(opened, answers)
        return
    results = suite.run_suite(*done)
    assert [row["dataset"] for row in results["rows"] if "missing" not in row] == ["phenobench"]
    assert (tmp_path / "out" / "suite_all.json").is_file()
    assert suite.check_data("phenobench", *own[:2], answers)[0].classes == answers


def test_classes_that_a_palette_lacks_are_a_row_beside_those_that_it_has(tmp_path):
    phenobench(tmp_path)
    write(tmp_path / "mine", "soil\ncrop\nweed\n")
    write(tmp_path / "other", "stone\ncrop\nweed\n")
    settings = parse({"data": {"root": str(tmp_path)}, "eval": {"split": "val", "calibrate": False}})
    palette = Palette(colors().read, codec=PaletteCodec(3))
    palette.seen_at = lambda side: palette
    results = suite.run_suite(
        settings.data, settings.eval, 0, palette, PARAMS, tmp_path / "out", "domains",
        to_dict(settings), None, ("soil", "crop", "weed"),
    )  # fmt: skip
    rows = {row["dataset"]: row for row in results["rows"]}
    assert rows["mine"]["asked_miou"] > 0 and "which lack stone" in rows["other"]["missing"]
    text = (tmp_path / "out/suite_domains.md").read_text()
    assert "not measured: these weights answer their own 3 classes alone, which lack stone" in text


@pytest.mark.usefixtures("cover")
def test_why_a_row_was_not_measured_is_in_the_table_and_on_the_page(tmp_path):
    write(tmp_path / "cells_wbc", CLASSES, ("train", "val"))
    write(tmp_path / "mine", "0: background\n1: thing\n", ("held_out",))
    settings = parse({"data": {"root": str(tmp_path)}, "eval": {"split": "held_out"}})
    with pytest.raises(UserError, match="can be scored"):
        suite.check_data("domains", settings.data, settings.eval)
    row = {"suite": "domains", "dataset": "cells_wbc", "estep": "1x1"}
    reason = "cells_wbc: none of its training images are held out; more of it"
    rows = [row | {"missing": reason}, row | {"dataset": "x", "missing": f"/{'long/' * 40}: no folder"}]
    found = suite_tables.lines({"suite": "domains", "rows": rows})
    assert found[0][6] == "not measured: cells_wbc: none of its training images are held out"
    assert found[1][6].startswith("not measured: /long/long") and "…" in found[1][6]
    assert found[1][6].endswith("long/: no folder") and len(found[1][6]) <= 104
    (tmp_path / "suite_domains.json").write_text(json.dumps({"suite": "domains", "rows": rows}))
    page = build_domain_pages(tmp_path).read_text()
    assert "none of its training images are held out" in page and "no data" not in page


def test_a_folder_that_is_no_domain_has_the_scale_of_the_evaluation_and_no_part_in_the_mean(tmp_path):
    for name in ("cells_wbc", "nuclei_dsb2018", "mine"):
        write(tmp_path / name, CLASSES)
    settings = parse({
        "data": {"root": str(tmp_path)},
        "eval": {"split": "val", "calibrate": False, "short_side": 300, "num_images": 1},
    })  # fmt: skip
    reader = Seen()
    own = settings.data, settings.eval, 0
    results = suite.run_suite(*own, reader, PARAMS, tmp_path / "out", "domains", to_dict(settings))
    there = {row["dataset"]: row for row in results["rows"] if "missing" not in row}
    sides = {d.name: d.short_side for d in DOMAINS}
    assert reader.sides == [sides[d.name] for d in DOMAINS if d.name in there]  # none for "mine"
    assert there["mine"]["unlisted"] and "unlisted" not in there["cells_wbc"]

    counted = [row["asked_miou"] for name, row in there.items() if name != "mine"]
    mean = suite_tables.lines(results)[-1]
    assert mean[1] == f"mean of {len(counted)} domains (without 1 other folder)"
    assert mean[7] == f"{100 * np.mean(counted):.2f}"
    assert "config.eval.short_side and do not count in the mean" in suite_tables.table(results)


@pytest.mark.parametrize(
    ("estep", "figure"),
    [("8x2", "50.8 at 3.15 FPS"), ("4x2", "50.5 at 5.82 FPS"), ("4x2:leading", "–"), ("2x1", "–")],
)
def test_no_figure_of_another_estep_stands_beside_a_score(estep, figure):
    scores = {"miou": 0.5, "images_per_second": 1.0, "queries_per_second": 1.0}
    row = {
        "suite": "semantic", "dataset": "coco_stuff", "estep": estep, "metric": "miou",
        "templates": ["{}"], "inference": "whole", "view_size": [8, 8], "boundary_iou": 0.5,
        "protocols": {"exhaustive": scores}, "headline_protocol": "exhaustive",
    }  # fmt: skip
    assert suite_tables.lines({"suite": "semantic", "rows": [row]})[0][8] == figure


def test_the_spacing_is_part_of_an_estep_on_every_page():
    results = {
        "dataset": "a", "split": "test", "num_images": 1, "ensemble": 4, "steps": 2, "seed": 0,
        "protocol": "", "templates": [], "inference": "whole", "view_size": [8, 8], "per_class": {},
        "miou": 0.5,
    }  # fmt: skip
    for spacing, told in (("leading", "4x2:leading"), ("trailing", "4x2"), (None, "4x2")):
        own = results | ({"spacing": spacing} if spacing else {})
        assert f"E-Step {told}, seed 0" in results_markdown(own)
        assert headline(own, "a")["estep"] == told.replace("x", " × ")


def test_a_suite_of_the_paper_runs_as_before(tmp_path):
    phenobench(tmp_path)
    settings = config(tmp_path)
    settings = dataclasses.replace(settings, eval=dataclasses.replace(settings.eval, sweep=("4x2",)))
    assert len(run(settings, colors(), tmp_path / "out", "phenobench")["rows"]) == 1
