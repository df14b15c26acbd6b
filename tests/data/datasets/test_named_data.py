# SPDX-License-Identifier: Apache-2.0
"""A named data set from its folder to a finished run: bank, queries, training, evaluation, report."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from digseg_jax.config.parse import default, parse, to_dict
from digseg_jax.config.schema import DataConfig, LoadingConfig, PartConfig
from digseg_jax.config.templates import fill
from digseg_jax.data import sources
from digseg_jax.data.captions import Captions
from digseg_jax.data.datasets import registry
from digseg_jax.data.datasets.statistics import sampled
from digseg_jax.data.pipeline import training_stream
from digseg_jax.data.sources import open_part, training_examples
from digseg_jax.data.vocabulary import Vocabulary, bank_prompts, vocabularies
from digseg_jax.errors import UserError
from digseg_jax.tools.prepare_data import prepare_split


@pytest.fixture(scope="module")
def camvid(tmp_path_factory):
    root = tmp_path_factory.mktemp("camvid")
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            size = (40, 36) if i != 1 else (70, 50)
            ids = Image.fromarray(rng.integers(0, 12, (3, 4), np.uint8)).resize(size, 0)
            image = rng.integers(0, 256, (*size[::-1], 3), np.uint8)
            Image.fromarray(image).save(root / "images" / split / f"{i}.jpg")
            ids.save(root / "annotations" / split / f"{i}.png")
    return str(root)


@pytest.fixture
def data(camvid):
    return DataConfig(name="camvid", root=camvid, image_size=32, num_queries=3)


def first(config, task="segmentation"):
    place = {"start": 0, "host": 0, "hosts": 1, "loading": LoadingConfig()}
    with training_stream(config, task, seed=0, batch_size=4, **place) as stream:
        return next(stream)


def test_every_query_is_a_prompt_of_its_class(data):
    prompts, facts = bank_prompts(data), registry.spec("camvid")
    batch = first(data)
    for query, c in zip(batch["query"].ravel(), batch["query_class"].ravel(), strict=True):
        info = facts.classes[c]
        assert prompts[query] in {fill(facts.template, n) for n in (info.name, *info.synonyms)}


def test_templates_and_synonyms_multiply_and_the_first_is_the_name(data):
    facts = registry.spec("camvid")
    words = Vocabulary.of(facts, ("a {} here", "{} in sight"), first=5)
    for c, info in enumerate(facts.classes):
        own = [words.prompts[row - 5] for row in words.rows[c]]
        assert own[0] == f"a {info.name} here" and f"{info.name} in sight" in own
        assert len(own) == 2 * (1 + len(info.synonyms))
    assert [r for rows in words.rows for r in rows] == list(range(5, 5 + len(words.prompts)))


def test_a_mixture_has_one_bank_and_every_part_its_rows(data, camvid):
    parts = (PartConfig("camvid", camvid, 3.0), PartConfig("camvid", camvid, 1.0, split="val"))
    mixed = dataclasses.replace(data, mixture=parts, templates=("{}",))
    a, b = vocabularies(mixed)
    assert bank_prompts(mixed) == [*a.prompts, *b.prompts]
    assert b.rows[0][0] == len(a.prompts)
    assert first(mixed)["query"].max() < len(bank_prompts(mixed))


def test_a_root_without_the_split_or_without_shards_says_what_to_do(camvid, tmp_path):
    facts = registry.spec("camvid")
    prepare_split(lambda: registry.open_source("camvid", camvid, "val"), facts, "val", tmp_path)
    with pytest.raises(UserError, match="shards of val only; .*--split=train"):
        open_part(PartConfig("camvid", str(tmp_path)), "train")
    assert len(open_part(PartConfig("camvid", str(tmp_path)), "val")) == 3


def test_a_run_notices_counts_that_were_prepared_since_if_it_draws_by_them(data, tmp_path, monkeypatch):
    """A sample of two examples has other class frequencies than all six."""
    facts = registry.spec("camvid")
    shutil.copytree(data.root, tmp_path / "own")
    data = dataclasses.replace(data, root=str(tmp_path / "own"))

    def known(**how):
        return training_examples(data, **how)["camvid"]

    monkeypatch.setattr(sources, "SAMPLE", 2)
    assert known()[0] == 6 and known()[2] == ""
    prepare_split(
        lambda: registry.open_source("camvid", data.root, "train"), facts, "train", tmp_path / "own"
    )
    assert known()[0] == 6 and known()[2] and known(by_class=False)[2] == ""

    # Where the sample has been the whole, nothing differs.
    monkeypatch.setattr(sources, "SAMPLE", 6)
    assert known()[2] == ""
    prepared = open_part(PartConfig("camvid", data.root), "train").statistics()
    own = sampled(registry.open_source("camvid", data.root, "train"), facts.num_classes, 6)
    assert prepared.to_dict() == own.to_dict()


def test_the_other_tasks_train_on_it_too(data):
    texts = Captions(registry.spec("camvid")).texts
    assert texts[0].startswith("image of ")
    captioned = first(data, "prior")
    assert captioned["query"].shape == (4, 1) and captioned["query"].max() < len(texts)
    assert first(data, "autoencoder")["query_class"].shape == (4, 3)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"name": "camvit"}, "camvid"),
        ({"jitter": 1.5}, "config.data.jitter=1.5: must be at least 0 and at most 1"),
        ({"scale_min": 0.0}, "config.data.scale_min=0.0"),
        ({"scale_min": 3.0}, "the minimum must be at most the maximum"),
        ({"templates": ["a photo"]}, "needs one {} for the class"),
        ({"templates": ["{} and {}"]}, "needs one {} for the class"),
        ({"templates": ["{0} {}"]}, "needs one {} for the class"),
        ({"mixture": [{"name": "camvid", "weight": 0.0}]}, "config.data.mixture[0].weight=0.0"),
        ({"mixture": [{"nam": "camvid"}]}, "config.data.mixture[0].nam"),
    ],
)
def test_what_is_illegal_is_told(values, expected):
    with pytest.raises(UserError) as caught:
        parse({"data": values})
    assert expected in tiny.one_line(caught.value)


def test_a_mixture_in_a_config_file_survives_json():
    values = default()
    values.data.mixture = ({"name": "camvid", "root": "/a", "weight": 2.0},)
    config = parse(values)
    assert config.data.mixture == (PartConfig("camvid", "/a", 2.0),)
    assert parse(json.loads(json.dumps(to_dict(config)))) == config
    assert parse({"data": {"name": "tfds:cityscapes"}}).data.name == "tfds:cityscapes"


def test_a_run_trains_evaluates_and_reports(folders, camvid, tmp_path):
    from digseg_jax import jobs

    config = tiny.config(
        folders, data__name="camvid", data__root=camvid, loading__workers=0, train__steps=2,
        eval__split="val", eval__num_images=0, eval__batch_size=2,
    )  # fmt: skip
    jobs.train(config, tmp_path)
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    facts = registry.spec("camvid")
    assert results["dataset"] == "camvid" and results["num_images"] == 3
    assert tuple(results["per_class"]) == facts.names
    labeled = sum(
        int((example["label"] >= 0).sum())
        for example in (registry.open_source("camvid", camvid, "val")[i] for i in range(3))
    )
    assert int(np.sum(results["confusion"])) == labeled  # no padding, no ignored pixel
    assert (tmp_path / "report" / "index.html").is_file()
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 <= line["hard_negative_share"] <= line["negative_share"] <= 1


def test_an_unfinished_runs_newest_checkpoint_can_be_exported(folders, camvid, tmp_path):
    from digseg_jax import jobs
    from digseg_jax.io.checkpoint import Checkpointer
    from digseg_jax.io.workdir import claim
    from digseg_jax.runtime.sharding import make_mesh
    from digseg_jax.training.tasks.segmentation import SegmentationTask
    from digseg_jax.weights import load_params

    config = tiny.config(
        folders, data__name="camvid", data__root=camvid, train__steps=2, eval__split="val",
        eval__num_images=1, eval__batch_size=1, eval__calibrate=True, eval__calibrate_split="train",
    )  # fmt: skip
    claim(tmp_path, to_dict(config))
    task = SegmentationTask(config)
    trainer = tiny.trainer(config, task, make_mesh(config.mesh), tmp_path)
    with Checkpointer(str(tmp_path), config.checkpoint) as checkpointer:
        # Of a trained state the average differs, too.
        _, state = trainer.start_state(checkpointer)
        state["ema"] = jax.tree.map(lambda x: x + 0.01, state["ema"])
        checkpointer.save(2, state | {"step": state["step"] + 2}, {})
    jobs.export(tmp_path, config)
    jobs.evaluate(tmp_path, config=config)
    assert (tmp_path / "eval" / "results.json").is_file()
    calibration, card = tmp_path / "export" / "calibration.json", tmp_path / "export" / "README.md"
    assert calibration.is_file() and "| camvid | val | 1 |" in card.read_text()

    # The same checkpoint keeps its scores; those of another one say nothing about it.
    jobs.export(tmp_path, config)
    assert calibration.is_file() and "| camvid | val | 1 |" in card.read_text()
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    results["weights"]["steps"] = 1
    (tmp_path / "eval" / "results.json").write_text(json.dumps(results))
    jobs.export(tmp_path, config)
    assert calibration.is_file() and "| camvid | val | 1 |" in card.read_text()  # its own
    calibration.unlink()
    jobs.export(tmp_path, config)
    assert not calibration.exists() and "not been evaluated" in card.read_text()
    exported = load_params(tmp_path / "export" / "unet", task.abstract)
    jax.tree.map(np.testing.assert_array_equal, exported, dict(state["ema"]))
