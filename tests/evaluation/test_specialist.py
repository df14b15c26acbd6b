# SPDX-License-Identifier: Apache-2.0
"""Weights of a single domain are scored on that domain, from its training's own configuration."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny
from experiments import get_config
from test_domains import write

from digseg_jax.config.parse import parse
from digseg_jax.data.datasets.domains import DOMAINS
from digseg_jax.data.sources import check_scored_splits, scored_part, validation_split
from digseg_jax.evaluation import plan
from digseg_jax.evaluation.examples import eval_examples
from digseg_jax.evaluation.fitting import same_competition
from digseg_jax.evaluation.job import evaluate
from digseg_jax.segmentation.palette import PaletteCodec
from digseg_jax.training.tasks.segmentation import SegmentationTask

CELLS = "0: background\n1: cytoplasm\n2: nucleus\n"


def specialist(name, root):
    values = get_config("generalist", name)
    values.data.root = str(root)
    return parse(values)


@pytest.mark.parametrize("domain", DOMAINS, ids=lambda domain: domain.name)
def test_a_specialist_scores_its_own_domain(domain):
    config = specialist(domain.name, "/DIR")
    part = scored_part(config.data)
    assert part.name == config.data.name == domain.reader and part.held_out == domain.held_out
    assert part.root == ("/DIR" if domain.reader == "landcover" else f"/DIR/{domain.name}")
    assert config.eval.split == domain.val and config.eval.short_side == domain.short_side


@pytest.mark.parametrize("version", ["all", "camvid", "nuclei_monuseg"])
def test_a_prior_of_the_same_domains_scores_nothing(version):
    config = parse(get_config("generalist_prior", version))
    assert config.task == "prior" and config.eval == parse({}).eval


def test_a_mixture_scores_what_it_names_and_tells_what_it_leaves_out():
    config = specialist("all", "/my data")
    assert scored_part(config.data).name == "landcover" and config.eval.short_side == 128
    told = plan.not_scored(config.data, "RUN")
    assert "scored landcover alone, of a mixture of 15 data sets" in told
    assert "--mode=eval --suite=domains --model=RUN/export '--config.data.root=/my data'" in told
    assert plan.not_scored(specialist("camvid", "/DIR").data, "RUN") == ""

    # Parts with roots of their own are no suite: there is no command for them.
    apart = [dataclasses.replace(part, folder="", root="/X") for part in config.data.mixture]
    told = plan.not_scored(dataclasses.replace(config.data, mixture=tuple(apart)), "RUN")
    assert "alone, of a mixture of 15 data sets" in told and "--suite" not in told

    # A data set that was named on purpose is scored in its own place, even if the part has its layout.
    own = specialist("cells_wbc", "/DIR").data
    (part,) = own.mixture
    moved = dataclasses.replace(own, mixture=(dataclasses.replace(part, root="/ELSEWHERE"),))
    assert scored_part(moved).root == "/DIR"


def test_nobody_asks_a_specialist_for_a_background(tmp_path):
    """In the training the word was never asked: it means nothing."""
    write(tmp_path / "cells_wbc", CELLS, ("train", "val"))
    config = specialist("cells_wbc", tmp_path)
    check_scored_splits(config.data, config.eval, while_training=True)
    assert validation_split(config.data, config.eval.split) == "val"
    examples = eval_examples(config.data, config.eval.split)
    assert examples.classes == ("background", "cytoplasm", "nucleus") and examples.asked == (1, 2)


def test_its_results_are_of_its_own_domain(folders, tmp_path, caplog):
    write(tmp_path / "cells_wbc", CELLS, ("train", "val"))
    given = specialist("cells_wbc", tmp_path)
    own = tiny.config(folders, eval__calibrate=False, eval__split="val", eval__short_side=168)
    (part,) = given.data.mixture
    data = dataclasses.replace(own.data, name=given.data.name, root=str(tmp_path), mixture=(part,))
    task = SegmentationTask(dataclasses.replace(own, data=data))
    results = evaluate(data, own.eval, 0, task, task.initial(), tiny.mesh(), tmp_path / "run")
    assert results == json.loads((tmp_path / "run/eval/results.json").read_text())
    assert (results["dataset"], results["title"]) == ("folder", "cells_wbc")
    assert list(results["per_class"]) == ["background", "cytoplasm", "nucleus"]
    assert results["num_images"] == 2 and results["short_side"] == 168

    # Biases would be fitted to a competition that knows the background: none are, but a palette's.
    examples = eval_examples(data, "val")
    assert not same_competition(examples, task.codec, own.eval.exhaustive_limit)
    assert same_competition(examples, PaletteCodec(3), own.eval.exhaustive_limit)
    assert "evaluation at scale" not in caplog.text  # 168 pixels are scale 1 of this domain's crops
