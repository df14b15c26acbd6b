# SPDX-License-Identifier: Apache-2.0
"""Prompts travel with the weights: what training asked with, every later question is asked in too."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny
from PIL import Image

from digseg_jax import jobs
from digseg_jax.config.parse import with_settings
from digseg_jax.data.datasets import registry
from digseg_jax.data.vocabulary import bank_prompts
from digseg_jax.errors import UserError
from digseg_jax.evaluation.evaluator import Evaluator
from digseg_jax.evaluation.examples import EvalExamples
from digseg_jax.evaluation.suite import SUITES
from digseg_jax.prediction.description import FILE, read_description
from digseg_jax.prediction.job import predict
from digseg_jax.prediction.pretrained import load_segmenter
from digseg_jax.prediction.segmenter import Segmenter
from digseg_jax.segmentation.palette import PROMPT

START, END = "A photo of a ", " in the scene"  # COCO-Stuff's template
ONE = {"eval.ensemble": 1, "eval.steps": 1}
DATASETS = sorted({name for names in SUITES.values() for name in names})


@pytest.fixture(scope="module")
def trained(folders):
    """The configuration of weights that were trained on COCO-Stuff."""
    return tiny.config(folders, data__name="coco_stuff", eval__view_size=(32,), eval__batch_size=1)


@pytest.fixture(scope="module")
def export(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "export"
    tiny.export(trained, folder)
    return folder


@pytest.fixture(scope="module")
def segment(export):
    return load_segmenter(export)


@pytest.fixture
def read(monkeypatch):
    """Every text that reaches the text encoder."""
    texts: list[str] = []
    encoded = Segmenter._encoded

    def spy(self, asked):
        texts.extend(asked)
        return encoded(self, asked)

    monkeypatch.setattr(Segmenter, "_encoded", spy)
    return texts


def in_template(texts) -> bool:
    return bool(texts) and all(t.startswith(START) and t.endswith(END) for t in texts)


def image(folder, side=40):
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "in.png")
    return folder / "in.png"


def phenobench(root):
    for name, value in (("images", (9, 99, 9)), ("semantics", 1)):
        (root / "phenobench" / "val" / name).mkdir(parents=True)
        mode = "RGB" if name == "images" else "L"
        Image.new(mode, (36, 36), value).save(root / "phenobench" / "val" / name / "0.png")
    return root


@pytest.mark.parametrize("name", DATASETS)
def test_a_suites_prompts_begin_as_the_prompts_of_training_do(name, trained, segment):
    assert in_template(bank_prompts(trained.data)[:20])
    facts = registry.spec(name)
    covers = tuple(facts.covers(c) for c in range(facts.num_classes))
    split = EvalExamples([], "val", (), facts.names, covers, template=facts.template)
    asked = Evaluator(segment, split, trained.eval, seed=0).prompts
    assert asked == tuple(f"{START}{n}{END}" for n in facts.names)


def test_a_suite_reads_them_and_its_files_say_so(export, tmp_path, read):
    settings = {"data.root": str(phenobench(tmp_path)), "eval.num_images": 1}
    out = tmp_path / "out"
    jobs.evaluate(out, "phenobench", model=str(export), settings=settings)
    asked = {f"{START}{n}{END}" for n in ("soil", "crop", "weed")}
    assert set(read) == asked
    (row,) = json.loads((out / "eval" / "suite_phenobench.json").read_text())["rows"]
    assert row["templates"] == [f"{START}{{}}{END}"] and row["inference"] == "window"
    (journal,) = (out / "eval" / "journal").glob("*.jsonl")
    lines = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    assert set(next(line["value"] for line in lines if line["key"] == "prompts")) == asked
    assert f"{START}{{}}{END}" in (out / "eval" / "suite_phenobench.md").read_text()


def test_prediction_reads_them_and_a_flag_asks_otherwise(export, tmp_path, read):
    source = str(image(tmp_path))
    predict(None, str(export), source, ["road", "a {} b"], tmp_path / "a.png", settings=ONE)
    assert set(read) == {f"{START}road{END}", f"{START}a {{}} b{END}"}
    assert json.loads((tmp_path / "a.json").read_text())["templates"] == [f"{START}{{}}{END}"]
    read.clear()
    own = ONE | {"eval.templates": ("{}",)}
    predict(None, str(export), source, ["road"], tmp_path / "b.png", settings=own)
    assert set(read) == {"road"}
    read.clear()
    predict(None, str(export), source, [], tmp_path / "c", "phenobench", settings=ONE)
    assert set(read) == {f"{START}{n}{END}" for n in ("soil", "crop", "weed")}


def test_prediction_asks_a_data_sets_classes_in_its_own_template(export, tmp_path, read, monkeypatch):
    """As a suite does, where the weights were trained on several data sets with a template each."""
    own = "a field with {}"
    mixed = tmp_path / "mixed"
    shutil.copytree(export, mixed)
    stored = json.loads((mixed / FILE).read_text())
    (mixed / FILE).write_text(json.dumps(stored | {"templates": [*stored["templates"], own]}))
    facts = dataclasses.replace(registry.spec("phenobench"), template=own)
    spec = registry.spec
    monkeypatch.setattr(registry, "spec", lambda name: facts if name == "phenobench" else spec(name))

    source, names = str(image(tmp_path)), ("soil", "crop", "weed")
    predict(None, str(mixed), source, [], tmp_path / "a", "phenobench", settings=ONE)
    assert set(read) == {f"a field with {name}" for name in names}
    assert json.loads((tmp_path / "a" / "in.json").read_text())["templates"] == [own]

    # The same words by hand are other prompts: the masks that are there are not taken for theirs.
    read.clear()
    predict(None, str(mixed), source, names, tmp_path / "a", settings=ONE)
    assert set(read) == {f"{START}{name}{END}" for name in names}


def test_python_asks_alike_and_several_templates_are_the_mean_of_their_probabilities(
    segment, tmp_path, read
):
    source, words = image(tmp_path), ["water", "snow and ice"]
    segment(source, words, 1, 1)
    assert in_template(read)
    one, two = (segment(source, words, 1, 1, templates=t).probability for t in ("{}", "forest {}"))
    assert np.abs(one - two).max() > 1e-4
    both = segment(source, words, 1, 1, templates=["{}", "forest {}"])
    assert both.queries == tuple(words) and both.facts["templates"] == ["{}", "forest {}"]
    np.testing.assert_allclose(both.probability, (one + two) / 2, atol=1e-6)


def test_several_templates_of_many_queries_are_read_by_the_probe_and_asked_in_groups(
    segment, tmp_path, monkeypatch
):
    """The other ways to an answer: undecoded masks, and groups that are asked when they are needed."""
    source, words = image(tmp_path), [f"land {i}" for i in range(18)]
    ways = ("{}", "forest {}")
    pixels = np.asarray(Image.open(source))

    def probed(*templates):
        settings = {"eval.decoder": "probe", "eval.templates": templates}
        probing = Segmenter(
            segment.task,
            segment.programs.params,
            with_settings(segment.task.config, settings).eval,
            mesh=segment.mesh,
        )
        return probing.predict_masks([pixels], words, ensemble=1, steps=1)[0]

    alone = [probed(template) for template in ways]
    assert np.abs(alone[0] - alone[1]).max() > 1e-4
    np.testing.assert_allclose(probed(*ways), np.mean(alone, axis=0), atol=1e-5)

    monkeypatch.setattr("digseg_jax.prediction.pretrained.HELD", 1)
    monkeypatch.setattr(
        segment, "settings", with_settings(segment.task.config, {"eval.decode_limit": 0}).eval
    )
    apart = segment(source, words, 1, 1, templates=ways)
    few = [segment(source, w, 1, 1, templates=ways).probability[0] for w in words[:2]]
    np.testing.assert_allclose(apart.plane(0), few[0], atol=1e-5)
    np.testing.assert_allclose(apart.plane(1), few[1], atol=1e-5)


def test_a_palette_has_one_text_whatever_the_template(folders, read):
    changes = {"model__codec": "palette", "data__templates": ("a photo of a {}",)}
    config = tiny.config(folders, eval__view_size=(32,), **changes)
    task = tiny.load_task(config, prompts=("any",))
    paint = Segmenter(task, task.initial(), mesh=tiny.mesh())
    pixels = np.zeros((32, 32, 3), np.uint8)
    (masks,) = paint.predict_masks([pixels], registry.spec("landcover").names, ensemble=1, steps=1)
    assert len(masks) == 8 and set(read) == {PROMPT} and paint.asks_in() == ()
    with pytest.raises(UserError, match="one text for all classes"):
        paint.asks_in(wanted=["{}"])
    with pytest.raises(UserError, match="config.eval.templates=.*whatever the class"):
        with_settings(config, {"eval.templates": ["{}"]})


@pytest.mark.parametrize("template", ["{0.__class__}", "{:>1000000000}", 3])
def test_a_template_from_outside_is_refused_in_one_line(template, export, segment, tmp_path):
    with pytest.raises(UserError) as caught:
        segment(image(tmp_path), "road", 1, 1, templates=[template])
    assert "needs one {}" in tiny.one_line(caught.value)
    values = json.loads((export / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(values | {"templates": [template]}))
    with pytest.raises(UserError) as caught:
        read_description(tmp_path)
    line = tiny.one_line(caught.value)
    assert line.startswith(str(tmp_path / FILE)) and "needs one {}" in line
