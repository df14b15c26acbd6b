# SPDX-License-Identifier: Apache-2.0
"""The paper's tables on made-up downloads: right numbers and labels, and a kill that costs nothing."""

from __future__ import annotations

import json
import os
from functools import partial

import numpy as np
import pytest
import tiny
from perfect import Reader
from PIL import Image
from sklearn.metrics import f1_score, jaccard_score

from digseg_jax.config.parse import parse, to_dict
from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import Config
from digseg_jax.data import sources
from digseg_jax.data.datasets import registry
from digseg_jax.errors import Transient, UserError
from digseg_jax.evaluation import paper, suite, suite_tables
from digseg_jax.evaluation.evaluator import Evaluator
from digseg_jax.evaluation.examples import eval_examples
from digseg_jax.metrics import binary
from digseg_jax.segmentation.binary import BinaryCodec
from digseg_jax.segmentation.palette import PaletteCodec
from digseg_jax.segmentation.prompted import PromptedCodec
from digseg_jax.tools.prepare_data import prepare_split

CHANNEL = {"background": 0, "soil": 0, "road": 1, "crop": 1, "weed": 2}
PARAMS = {"weight": np.ones(3, np.float32)}


def colors(presence=(0.9, 0.8, 0.1)):
    """A segmenter that reads the mask off the image: channel c is the probability of query c."""
    cells = np.array(presence, np.float32)[:, None, None] * np.ones((1, 4, 4), np.float32)
    return Reader(lambda image, query: image[..., CHANNEL[query]].astype(np.float32) / 255, cells)


def picture(label, seed, noise=90):
    """Channels follow the classes, with noise: some pixels are wrong."""
    rng = np.random.default_rng(seed)
    sure = np.stack([label == c for c in range(3)], axis=-1) * 120 + 60
    return np.clip(sure + rng.integers(-noise, noise, sure.shape), 0, 255).astype(np.uint8)


def phenobench(root, n=3):
    labels = []
    for name in ("images", "semantics"):
        (root / "phenobench" / "val" / name).mkdir(parents=True)
    for i in range(n):
        label = np.random.default_rng(i).integers(0, 3, (8, 9))
        Image.fromarray(picture(label, i)).save(root / f"phenobench/val/images/{i}.png")
        Image.fromarray(label.astype(np.uint16)).save(root / f"phenobench/val/semantics/{i}.png")
        labels.append(label)
    return labels


def config(root, **changes):
    return parse({"data": {"root": str(root)}, "eval": {"inference": "whole", **changes}})


def run(settings, segmenter, out, name, params=PARAMS, about=None):
    own = settings.data, settings.eval, settings.seed
    return suite.run_suite(*own, segmenter, params, out, name, to_dict(settings), about)


def test_label_maps_are_scored_under_three_protocols(tmp_path):
    labels = phenobench(tmp_path)
    out = tmp_path / "out"
    results = run(config(tmp_path, gate_cut=0.5), colors(), out, "phenobench")
    row = results["rows"][0]
    prediction = [picture(label, i).argmax(-1) for i, label in enumerate(labels)]
    true, found = np.concatenate(labels).ravel(), np.concatenate(prediction).ravel()
    expected = jaccard_score(true, found, average="macro")
    assert row["protocols"]["exhaustive"]["miou"] == pytest.approx(expected, abs=1e-9)
    assert set(row["protocols"]) == {"oracle", "gated", "exhaustive"}
    assert row["per_class"].keys() == {"soil", "crop", "weed"}
    gated = [picture(label, i)[..., :2].argmax(-1) for i, label in enumerate(labels)]
    expected = jaccard_score(true, np.concatenate(gated).ravel(), average="macro")
    assert row["protocols"]["gated"]["miou"] == pytest.approx(expected, abs=1e-9)
    assert row["gate_recall"][2]["classes"] == pytest.approx(2 / 3)
    text = (out / "suite_phenobench.md").read_text()
    assert "| oracle | mIoU |" in text and "does not compare" in text
    assert json.loads((out / "suite_phenobench.json").read_text())["suite"] == "phenobench"


def test_the_rule_for_classes_that_no_label_shows_changes_the_headline(tmp_path):
    """mmseg counts a class that is found and never true with 0; detectron2 leaves it out."""
    phenobench(tmp_path)
    for mask in (tmp_path / "phenobench/val/semantics").iterdir():
        label = np.asarray(Image.open(mask)).copy()
        label[label == 2] = 0  # what was weed is soil, and the image still shows weed
        Image.fromarray(label).save(mask)
    scores, rules = {}, ("mmseg", "detectron2")
    for rule in rules:
        settings = config(tmp_path, absent_rule=rule)
        (row,) = run(settings, colors(), tmp_path / rule, "phenobench")["rows"]
        assert row["absent_rule"] == rule
        scores[rule] = row["protocols"]["exhaustive"]["miou"]
    assert scores["mmseg"] == pytest.approx(scores["detectron2"] * 2 / 3)


def without_speed(value):
    if isinstance(value, dict):
        return {k: without_speed(v) for k, v in value.items() if not str(k).endswith("per_second")}
    return [without_speed(v) for v in value] if isinstance(value, list) else value


class Killed(BaseException):
    """Ends a run as a signal would."""


def test_a_killed_suite_goes_on_and_ends_with_the_same_scores(tmp_path):
    phenobench(tmp_path)
    whole = run(config(tmp_path), colors(), tmp_path / "whole", "phenobench")
    dying = colors()
    answer = dying.segment

    def dies(*arguments, **options):
        if dying.asked == 4:
            raise Killed
        return answer(*arguments, **options)

    dying.segment = dies
    with pytest.raises(Killed):
        run(config(tmp_path), dying, tmp_path / "killed", "phenobench")
    second = colors()
    again = run(config(tmp_path), second, tmp_path / "killed", "phenobench")
    assert without_speed(again) == without_speed(whole)
    # Three images: for all classes, coarse, gated and for what is there; one coarse pass was lost.
    assert dying.asked + second.asked == 3 * 4 + 1


@pytest.mark.parametrize("change", [{"eval": {"gate_limit": 1}}, {"data": {"image_size": 128}}])
def test_other_settings_do_not_reuse_what_was_counted(tmp_path, change):
    phenobench(tmp_path)
    base = {"data": {"root": str(tmp_path)}, "eval": {"inference": "whole"}}
    run(parse(base), colors(), tmp_path / "out", "phenobench")
    same, other, trained_on = colors(), colors(), colors()
    run(parse(base), same, tmp_path / "out", "phenobench")
    assert same.asked == 0
    changed = base | {k: base.get(k, {}) | v for k, v in change.items()}
    run(parse(changed), other, tmp_path / "out", "phenobench")
    assert other.asked == 12
    weights = {"weight": np.zeros(3, np.float32)}
    run(parse(base), trained_on, tmp_path / "out", "phenobench", weights)
    assert trained_on.asked == 12, "other weights"


@pytest.mark.parametrize("same_size", [True, False], ids=["of the same size", "of another size"])
def test_counts_of_a_mask_that_was_corrected_since_are_not_reused(tmp_path, same_size):
    """The number of images is the same: nothing else told that the labels are others."""
    phenobench(tmp_path)
    run(config(tmp_path), colors(), tmp_path / "out", "phenobench")
    mask = tmp_path / "phenobench/val/semantics/1.png"
    before = mask.stat()
    if same_size:  # a change of a few pixels may keep the size, but not the time
        os.utime(mask, (before.st_atime, before.st_mtime + 2))
    else:
        Image.fromarray(np.zeros((8, 9), np.uint16)).save(mask)
        os.utime(mask, (before.st_atime, before.st_mtime))
    again = colors()
    run(config(tmp_path), again, tmp_path / "out", "phenobench")
    assert again.asked == 12


def test_counts_of_another_autoencoder_are_not_reused_and_those_of_a_copy_are(tmp_path):
    """An export in a bucket is read from a copy, which lies elsewhere at every start."""
    phenobench(tmp_path)
    asked = []
    for vae, digest in (("/a/vae", "1f"), ("/b/vae", "1f"), ("/b/vae", "2e")):
        settings = parse({
            "data": {"root": str(tmp_path)}, "eval": {"inference": "whole"}, "model": {"vae": vae},
        })  # fmt: skip
        segmenter = colors()
        about = {"datasets": [], "steps": 1, "started_from": "", "parts": {"vae": digest, "text": "3d"}}
        run(settings, segmenter, tmp_path / "out", "phenobench", about=about)
        asked.append(segmenter.asked)
    assert asked[0] > 0 and asked[1] == 0 and asked[2] == asked[0]


class Split:
    """A source of made-up images of one foreground class."""

    def __init__(self, n, seed):
        rng = np.random.default_rng(seed)
        self.labels = (rng.random((n, 8, 8)) < 0.3).astype(np.int32)
        self.images = [picture(label, seed + i, 150) for i, label in enumerate(self.labels)]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {"image": self.images[i], "label": self.labels[i], "name": str(i)}

    def files(self, i):
        return {"image": f"{i}.png", "label": f"{i}.png"}


def test_a_foreground_class_has_both_averages_and_a_threshold_found_elsewhere(tmp_path, monkeypatch):
    splits = {"test": Split(4, 10), "train": Split(5, 50)}
    monkeypatch.setattr(sources.registry, "open_source", lambda name, root, split: splits[split])
    results = run(config(tmp_path), colors(), tmp_path, "deepglobe")
    row = results["rows"][0]
    true = splits["test"].labels.ravel()
    soft = np.stack(splits["test"].images)[..., 1].ravel() / 255
    assert row["f1_pooled"] == pytest.approx(f1_score(true, soft > 0.5), abs=1e-9)
    found = row["searched"]
    expected = f1_score(true, soft > found["threshold"])
    assert found["split"] == "train" and found["f1_pooled"] == pytest.approx(expected, abs=1e-9)
    train = np.stack(splits["train"].images)[..., 1].ravel() / 255
    best = max(f1_score(splits["train"].labels.ravel(), train > t) for t in binary.THRESHOLDS)
    reached = f1_score(splits["train"].labels.ravel(), train > found["threshold"])
    assert reached == pytest.approx(best, abs=1e-9)
    text = suite_tables.table(results)
    assert "threshold 0.5" in text and "found on train" in text and "65.78" in text


def test_the_threshold_is_found_on_masks_of_the_scale_of_those_that_are_scored(monkeypatch):
    facts = sources.registry.spec("deepglobe")
    monkeypatch.setattr(sources.registry, "open_source", lambda name, root, split: Split(2, 10))
    data = parse({"data": {"name": "deepglobe", "root": "DIR"}, "eval": {"split": "test"}}).data
    given = []

    class Noted(Reader):
        def segment(self, requests, estep, **options):
            given.append(options["scale"])
            return super().segment(requests, estep, **options)

    reader = Noted(lambda image, query: image[..., 1].astype(np.float32) / 255)
    examples = eval_examples(data, facts.eval_split)
    found = Evaluator(reader, examples, Config().eval, seed=0)
    found.threshold_counts(EStep(1, 1), examples, scale=4.0)
    assert set(given) == {4.0}


@pytest.mark.parametrize(
    ("codec", "rivals"), [(BinaryCodec(), False), (PromptedCodec(4), True), (PaletteCodec(2), True)]
)
def test_the_threshold_is_found_beside_the_rivals_of_the_scored_images(monkeypatch, codec, rivals):
    facts = sources.registry.spec("deepglobe")
    monkeypatch.setattr(sources.registry, "open_source", lambda name, root, split: Split(1, 10))
    data = parse({"data": {"name": "deepglobe", "root": "DIR"}, "eval": {"split": "test"}}).data
    asked = []

    def read(image, query):
        asked.append(query)
        return image[..., 1].astype(np.float32) / 255

    examples = eval_examples(data, facts.eval_split)
    found = Evaluator(Reader(read, codec=codec), examples, Config().eval, seed=0)
    found.threshold_counts(EStep(1, 1), examples)
    assert asked == list(found.queries if rivals else found.queries[-1:])


def test_a_bucket_that_does_not_answer_is_no_missing_data_set(tmp_path, monkeypatch):
    def late(name, root, split):
        raise Transient("gs://bucket: status 503")

    monkeypatch.setattr(sources.registry, "open_source", late)
    with pytest.raises(Transient, match="503"):
        run(config(tmp_path), colors(), tmp_path, "deepglobe")
    with pytest.raises(Transient, match="503"):
        suite.check_data("deepglobe", config(tmp_path).data, config(tmp_path).eval)
    data = parse({"data": {"name": "deepglobe", "root": "DIR"}, "eval": {"split": "test"}}).data
    with pytest.raises(Transient, match="503"):
        sources.validation_split(data, "test")


@pytest.mark.parametrize("name", ["coco", ""])
def test_an_unknown_suite_is_told(tmp_path, name):
    with pytest.raises(UserError) as caught:
        run(config(tmp_path), colors(), tmp_path, name)
    assert "legal values are open_vocab" in tiny.one_line(caught.value)


def test_a_folder_of_data_sets_that_is_not_there_is_told_at_once(tmp_path):
    """Of the domains the land cover needs no data: it alone would be scored."""
    settings = config(tmp_path / "gone")
    with pytest.raises(UserError, match="gone': no such folder") as caught:
        suite.check_data("domains", settings.data, settings.eval)
    tiny.one_line(caught.value)

    # In a folder that is there, a suite needs one of its data sets; the domains have the land cover.
    suite.check_data("domains", config(tmp_path).data, config(tmp_path).eval)
    with pytest.raises(UserError, match="no data set of it under") as caught:
        suite.check_data("medical", config(tmp_path).data, config(tmp_path).eval)
    tiny.one_line(caught.value)


@pytest.mark.parametrize("name", ["phenobench", "all", "domains"])
def test_shards_older_than_the_files_beside_them_are_not_scored(tmp_path, name):
    """Their labels are the old ones; the same refusal as in training, before anything is loaded."""
    if name == "domains":
        root = tmp_path / "own"
        for kind in ("images", "masks"):
            (root / kind / "val").mkdir(parents=True)
        (root / "classes.txt").write_text("soil\nplant\n")
        label = np.random.default_rng(0).integers(0, 2, (8, 9)).astype(np.uint8)
        Image.fromarray(picture(label, 0)).save(root / "images/val/0.png")
        Image.fromarray(label).save(mask := root / "masks/val/0.png")
    else:
        phenobench(tmp_path)
        root = tmp_path / "phenobench"
        mask = root / "val/semantics/0.png"
    dataset = "folder" if name == "domains" else "phenobench"
    opened = partial(registry.open_source, dataset, root, "val")
    prepare_split(opened, registry.spec(dataset, root), "val", root)

    settings = config(tmp_path, split="val", calibrate=False)
    suite.check_data(name, settings.data, settings.eval)
    os.utime(mask, (0, (root / "val/manifest.json").stat().st_mtime + 60))
    with pytest.raises(UserError) as caught:
        suite.check_data(name, settings.data, settings.eval)
    assert f"such as {mask}; renew them: python -m digseg_jax" in tiny.one_line(caught.value)

    # A label that is corrected while the weights load leaves no score behind.
    if name == "phenobench":
        with pytest.raises(UserError, match="newer than what was made from them"):
            run(settings, colors(), tmp_path / "out", name)


def test_a_suite_without_any_data_is_told(tmp_path):
    with pytest.raises(UserError) as caught:
        run(config(tmp_path), colors(), tmp_path, "driving")
    assert "no data set of it" in tiny.one_line(caught.value)


def test_missing_data_sets_are_named_in_the_table():
    row = {"suite": "driving", "dataset": "bdd100k", "estep": "8x2", "missing": "no folder"}
    assert "bdd100k | 8x2 | – | – | – | not measured" in suite_tables.table(
        {"suite": "driving", "seed": 0, "rows": [row]}
    )


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0.1234, "0.123"), (12.34, "12.3"), (999.4, "999"), (999.9, "1000"), (12345, "12345")],
)
def test_rates_are_written_in_digits(rate, text):
    scores = {"miou": 0.5, "images_per_second": rate, "queries_per_second": rate}
    row = {
        "suite": "driving", "dataset": "bdd100k", "estep": "8x2", "metric": "miou", "templates": ["{}"],
        "inference": "whole", "view_size": [8, 8], "protocols": {"oracle": scores}, "boundary_iou": 0.5,
        "headline_protocol": "oracle",
    }  # fmt: skip
    assert suite_tables.lines({"suite": "driving", "rows": [row]})[0][-2:] == [text, text]
    row |= {"metric": "asked", "num_images": 1, "split": "val", "scored": 1, "asked_miou": 0.5}
    assert suite_tables.lines({"rows": [row | {"images_per_second": rate}]})[0][-2] == text


def test_the_papers_rows_stand_beside_what_they_can_be_compared_with():
    assert paper.figure("medical", "monuseg", "f1") == "78.27 (CLIP), 84.56 (BiomedCLIP)"
    assert paper.figure("medical", "monuseg", "f1", searched=True) == "79.84 (CLIP)"
    assert paper.figure("deepglobe", "deepglobe", "iou") == "65.78"
    assert paper.figure("deepglobe", "deepglobe", "iou", searched=True) == "–"
    assert paper.figure("open_vocab", "cityscapes", "miou") == "38.5 (L/14), 36.5 (B/16)"
    assert paper.figure("medical", "refuge2", "disc_dice") == "–"


def test_a_table_says_prompts_input_protocol_and_what_the_weights_were_trained_on(tmp_path):
    phenobench(tmp_path)
    about = {"datasets": ["coco_stuff", "ade20k"], "steps": 80, "started_from": "sd-2.1:unet"}
    settings = config(tmp_path, templates=["{}"])
    results = run(settings, colors(), tmp_path / "out", "phenobench", about=about)
    text = (tmp_path / "out" / "suite_phenobench.md").read_text()
    assert "Weights trained on coco_stuff, ade20k, 80 steps from sd-2.1:unet." in text
    row = next(line for line in text.splitlines() if "| oracle |" in line)
    assert '| "{}" | whole image in 8x8 | oracle | mIoU |' in row
    assert results["rows"][0]["templates"] == ["{}"]


def test_every_figure_of_the_paper_belongs_to_a_data_set_of_its_suite():
    for name, dataset in paper.ROWS:
        assert dataset in suite.SUITES[name]
    assert set(suite.SUITES["open_vocab"]) <= set(sources.registry.names())
