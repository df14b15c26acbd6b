# SPDX-License-Identifier: Apache-2.0
"""Same weights, same images: the same integers from every way to ask and on every number of devices."""

from __future__ import annotations

import json

import jax
import numpy as np
import official_trees
import pytest
import tiny
from PIL import Image

import digseg_jax
from digseg_jax.config.parse import to_dict
from digseg_jax.config.sampling import EStep
from digseg_jax.data.datasets.readers import deepglobe
from digseg_jax.evaluation import suite
from digseg_jax.evaluation.counts import count_image
from digseg_jax.evaluation.evaluator import Evaluator
from digseg_jax.evaluation.examples import eval_examples
from digseg_jax.evaluation.job import evaluate
from digseg_jax.evaluation.journal import unpack
from digseg_jax.prediction.segmenter import Segmenter

TWO = EStep(2, 1)
GROWTH = 9  # times the side of the official trees' images of 6 x 4 pixels: several views
DEVICES = (1, 8)
# data set -> the suite that has it; one for each kind of counts
SETS = {"pascal_voc": "open_vocab", "deepglobe": "deepglobe", "refuge2": "medical"}
# classes of the images that are added to Pascal VOC's one: few, one, and more than are decoded
CLASSES = (range(5, 8), range(1), range(1, 15))


def write_trees(root):
    """The official layouts, with images of several views, noise that makes near ties."""
    for name in SETS:
        official_trees.TREES[name](root / name)
    voc = root / "pascal_voc/VOCdevkit/VOC2012"
    stems = ["2007_000033", *(f"2008_00000{i}" for i in range(len(CLASSES)))]
    official_trees.lines(voc / "ImageSets/Segmentation/val.txt", *stems)
    for stem, classes in zip(stems[1:], CLASSES, strict=True):
        official_trees.image(voc / f"JPEGImages/{stem}.jpg")
        label = official_trees.grid(*classes)
        official_trees.save_palette(voc / f"SegmentationClass/{stem}.png", label)

    rng = np.random.default_rng(0)
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".jpg", ".png", ".bmp")):
        with Image.open(path) as opened:
            size = tuple(GROWTH * side for side in opened.size)
            label = opened.resize(size, Image.Resampling.NEAREST)
        noise = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8))
        (noise if path.suffix == ".jpg" else label).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_trees(folder)
    with pytest.MonkeyPatch.context() as patch:  # of the benchmark's 1530 test images one is here
        patch.setattr(deepglobe, "shipped_list", lambda _: ["388122"])
        yield folder


@pytest.fixture(scope="module", params=["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def made(request, folders, root):
    """A configuration whose gate and decoder choose among the classes."""

    def config(name="", **changes):
        """Of all data sets, or of one that is evaluated by itself."""
        where = {"data__name": name or "pascal_voc", "data__root": str(root / name)}
        return tiny.config(
            folders, **where, eval__inference="window",
            eval__view_size=(32,), eval__batch_size=1, eval__gate_limit=4, eval__decode_limit=8,
            eval__ensemble=2, eval__num_images=0,
            model__dtype=request.param, **changes,
        )  # fmt: skip

    return config


@pytest.fixture(scope="module")
def export(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    tiny.export(made(), folder)
    return folder


@pytest.fixture(scope="module")
def segmenter(export, made):
    """What Python gets, on all eight devices."""
    return digseg_jax.load_segmenter(export, made())


@pytest.fixture(scope="module")
def spread(segmenter):
    """Devices -> the same weights on so many of them."""
    assert segmenter.mesh.size == DEVICES[-1]
    params = jax.device_get(segmenter.programs.params)
    fewer = {
        count: Segmenter(segmenter.task, params, segmenter.settings, mesh=tiny.mesh(data=count))
        for count in DEVICES[:-1]
    }
    return fewer | {DEVICES[-1]: segmenter}


def counts(journal):
    """Images' rows of a journal's file by key, without the times."""
    rows = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    return {row["key"]: {**row["value"], "seconds": 0.0} for row in rows if row["key"] != "prompts"}


@pytest.fixture(scope="module")
def suites(spread, made, root, tmp_path_factory):
    """devices -> data set -> the rows that its suite counts."""
    found = {}
    for count, each in spread.items():
        out = tmp_path_factory.mktemp(f"suite{count}")
        for name in SETS.values():
            config = made()
            own = config.data, config.eval, config.seed
            suite.run_suite(*own, each, each.programs.params, out, name, to_dict(config))
        found[count] = {name: counts(out / "journal" / f"{name}_{TWO}.jsonl") for name in SETS}
    return found


def test_a_suite_counts_the_same_on_any_devices(suites):
    """Every protocol, label maps, thresholds of a foreground, nested regions."""
    assert suites[8] == suites[1]
    rows = suites[1]["pascal_voc"]
    assert {key.split()[1] for key in rows} == {"exhaustive", "gated", "oracle"}
    assert {rows[f"{TWO} oracle {i}"]["queries"] for i in range(4)} >= {1, 3, 14}
    assert any("foreground" in row for row in suites[1]["deepglobe"].values())
    assert any("threshold" in key for key in suites[1]["deepglobe"])
    assert all("regions" in row for row in suites[1]["refuge2"].values())


@pytest.mark.parametrize("devices", [1, 8])
def test_an_evaluation_after_training_counts_what_the_suite_counts(
    spread, suites, made, tmp_path, devices
):
    config, each = made("pascal_voc", eval__split="val"), spread[devices]
    results = evaluate(
        config.data, config.eval, config.seed, each.task, each.programs.params, each.mesh, tmp_path
    )
    rows = [suites[1]["pascal_voc"][f"{TWO} exhaustive {i}"] for i in range(results["num_images"])]
    expected = sum(unpack(row["confusion"]) for row in rows)
    np.testing.assert_array_equal(results["confusion"], expected)
    assert results["num_images"] == 4 and expected.sum() > 0


def test_masks_that_python_gets_are_counted_the_same(segmenter, suites, made):
    for name in SETS:
        examples = eval_examples(made(name).data, "val" if name == "pascal_voc" else "test")
        for i in range(len(examples)):
            image, label = examples[i]["image"], examples[i]["label"]
            words = {"templates": segmenter.asks_in(examples.template), "index": i}
            masks = segmenter(image, examples.classes, TWO.ensemble, TWO.steps, **words)
            asked = range(len(examples.classes))
            row = count_image(examples, label, masks._answer, asked).row
            expected = suites[1][name][f"{TWO} exhaustive {i}"]
            assert row == {key: expected[key] for key in row}, (name, i)


def test_biases_are_fitted_alike_on_any_devices(spread, made):
    config = made("pascal_voc", eval__split="val")
    fits = []
    for each in (spread[1], spread[8]):
        examples = eval_examples(config.data, "val")
        evaluator = Evaluator(each, examples, config.eval, seed=0)
        fits.append(evaluator.calibrate(TWO, eval_examples(config.data, "train")))
    assert fits[0] == fits[1] and any(fits[0].bias)
