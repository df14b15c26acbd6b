# SPDX-License-Identifier: Apache-2.0
"""--suite=domains on made-up folders: what is asked, at which scale, and the mean that is reported."""

from __future__ import annotations

import json

import numpy as np
import pytest
from perfect import Reader
from PIL import Image
from sklearn.metrics import jaccard_score

from digseg_jax.config.parse import parse, to_dict
from digseg_jax.data.datasets.domains import DOMAINS, WRONG_NAMES, wrong_names
from digseg_jax.errors import UserError
from digseg_jax.evaluation import domains, suite, suite_tables
from digseg_jax.evaluation.examples import EvalExamples
from digseg_jax.evaluation.journal import pack
from digseg_jax.evaluation.scores import Scores

PARAMS = {"weight": np.ones(3, np.float32)}
CHANNEL = {"cytoplasm": 0, "nucleus": 1, "thing": 0}  # other names: 2


class Seen(Reader):
    """A reader that notes what it is asked at which scale."""

    def __init__(self):
        super().__init__(self.channel)
        self.queries, self.sides = set(), []

    def channel(self, image, query):
        self.queries.add(query)
        return image[..., CHANNEL.get(query, 2)].astype(np.float32) / 255

    def seen_at(self, short_side):
        self.sides.append(short_side)
        return self


def write(folder, classes, splits=("val",), count=3):
    """Images whose channels are probabilities of classes 1 and 2; wrong in some pixels."""
    (folder / "classes.txt").parent.mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text(classes)
    true, found = [], []
    for split in splits:
        for side in ("images", "masks"):
            (folder / side / split).mkdir(parents=True)
        for i in range(count):
            rng = np.random.default_rng(i)
            label = rng.integers(0, classes.count("\n"), (8, 9)).astype(np.uint8)
            image = rng.integers(0, 150, (8, 9, 3)).astype(np.uint8)
            for c in (1, 2):
                image[..., c - 1] += 90 * (label == c).astype(np.uint8)
            Image.fromarray(image).save(folder / f"images/{split}/{i}.png")
            Image.fromarray(label).save(folder / f"masks/{split}/{i}.png")
            sure = image[..., :2].astype(np.float32) / 255
            found.append(np.where(sure.max(-1) > 0.5, sure.argmax(-1) + 1, 0))
            true.append(label)
    return np.concatenate(true).ravel(), np.concatenate(found).ravel()


def run(root, out, segmenter, **settings):
    values = {"split": "val", "ensemble": 1, "steps": 1, "calibrate": False} | settings
    config = parse({"data": {"root": str(root)}, "eval": values})
    own = config.data, config.eval, config.seed
    return suite.run_suite(*own, segmenter, PARAMS, out, "domains", to_dict(config))


def test_a_background_is_what_no_class_claims(tmp_path):
    true, found = write(tmp_path / "cells_wbc", "0: background\n1: cytoplasm\n2: nucleus\n")
    segmenter = Seen()
    results = run(tmp_path, tmp_path / "out", segmenter, num_images=3)
    row = next(row for row in results["rows"] if row["dataset"] == "cells_wbc")
    expected = jaccard_score(true, found, average=None)
    assert list(row["per_class"].values()) == pytest.approx(expected.tolist(), abs=1e-9)
    assert row["asked_miou"] == pytest.approx(expected[1:].mean(), abs=1e-9) and row["scored"] == 2
    assert {"cytoplasm", "nucleus"} < segmenter.queries
    assert "background" not in segmenter.queries  # nobody asks for it by name
    images = [np.asarray(Image.open(p)) for p in (tmp_path / "cells_wbc/images/val").iterdir()]
    covered = np.mean([(image[..., 2] / 255 > 0.5).mean() for image in images])
    assert set(row["wrong_names"]) == set(WRONG_NAMES.values()) - {"nucleus"}
    assert list(row["wrong_names"].values()) == pytest.approx([covered] * 8) and covered > 0
    text = (tmp_path / "out" / "suite_domains.md").read_text()
    assert f"| mean area of 8 names of other domains | {100 * covered:.2f} |" in text
    assert "mean IoU (classes: 2, images: 3 of val)" in text and "own scale" in text
    gallery = json.loads((tmp_path / "out" / "domains" / "cells_wbc" / "gallery.json").read_text())
    assert [item["id"] for item in gallery["items"]] == ["0", "1", "2"]
    assert row["scored_classes"] == ["cytoplasm", "nucleus"]
    for item, one, guess in zip(
        gallery["items"], true.reshape(3, -1), found.reshape(3, -1), strict=True
    ):
        asked = jaccard_score(one, guess, average=None, labels=[1, 2])
        assert item["miou"] == pytest.approx(asked.mean(), abs=1e-9)  # without the background
    again = run(tmp_path, tmp_path / "out", Seen(), num_images=3)  # from the journal
    assert again == results and (tmp_path / "out/domains/cells_wbc/gallery.json").is_file()


@pytest.mark.usefixtures("cover")
def test_each_domain_is_seen_at_its_scale_and_a_missing_one_is_a_row(tmp_path):
    write(tmp_path / "cells_wbc", "0: background\n1: cytoplasm\n2: nucleus\n")
    write(tmp_path / "mine", "0: background\n1: thing\n")
    segmenter = Seen()
    results = run(tmp_path, tmp_path / "out", segmenter, num_images=1)
    names = [row["dataset"] for row in results["rows"]]
    assert names == [*(d.name for d in DOMAINS), "mine"]  # a folder of the user's own comes last
    there = [d.short_side for d in DOMAINS if d.name in ("cells_wbc", "landcover")]
    assert segmenter.sides == there  # and the user's own at that of the evaluation
    missing = {row["dataset"] for row in results["rows"] if "missing" in row}
    assert missing == {d.name for d in DOMAINS} - {"cells_wbc", "landcover"}
    assert "| domains | retina_disc | 1x1 | – | – | – | not measured" in suite_tables.table(results)


def test_a_domain_without_held_out_images_says_so(tmp_path):
    with pytest.raises(UserError, match="cells_wbc: none of its training images are held out"):
        write(tmp_path / "cells_wbc", "0: background\n1: cytoplasm\n2: nucleus\n", ("train", "val"))
        domain = next(d for d in DOMAINS if d.name == "cells_wbc")
        domains.domain_examples(domain, str(tmp_path), "held_out")


def test_a_set_without_a_test_split_is_scored_on_its_val(tmp_path):
    write(tmp_path / "cells_wbc", "0: background\n1: cytoplasm\n2: nucleus\n", ("train", "val"))
    domain = next(d for d in DOMAINS if d.name == "cells_wbc")
    assert domains.domain_examples(domain, str(tmp_path), "test").split == "val"
    write(tmp_path / "new", "0: background\n1: cytoplasm\n2: nucleus\n", ("val", "test"))
    other = domains.domains_below(str(tmp_path))[-1]
    assert other.name == "new"
    assert domains.domain_examples(other, str(tmp_path), "test").split == "test"


def test_a_wrong_name_is_of_a_group_that_the_images_cannot_show():
    street = next(d for d in DOMAINS if d.name == "camvid")
    # It may show what an aerial image calls a road network.
    assert set(wrong_names(street)) == {"nucleus", "optic disc", "weed", "wetland"}
    assert {d.group for d in DOMAINS} == WRONG_NAMES.keys()
    assert wrong_names(domains.Domain("mine")) == ()


def test_the_table_ends_with_the_mean_of_the_domains_that_were_there():
    row = {
        "suite": "domains", "estep": "1x1", "metric": "asked", "headline_protocol": "exhaustive",
        "split": "val", "num_images": 3, "scored": 1, "templates": ["{}"], "inference": "window",
        "view_size": [128, 128], "short_side": 128,
    }  # fmt: skip
    rows = [row | {"dataset": "a", "asked_miou": 0.5}, row | {"dataset": "b", "asked_miou": 0.25}]
    missing = {"suite": "domains", "dataset": "c", "estep": "1x1", "missing": "no such folder"}
    found = suite_tables.lines({"suite": "domains", "rows": [*rows, missing]})
    assert found[-1][1] == "mean of 2 domains" and "37.50" in found[-1]
    assert all(len(line) == len(suite_tables.COLUMNS) for line in found)


def test_an_image_is_ranked_by_the_score_of_its_domain():
    """Mean over the asked classes that the image shows, whatever its background's IoU is."""
    counts = np.array([[90, 0, 10, 0], [0, 6, 0, 2], [0, 0, 0, 0]])
    row = {"confusion": pack(counts), "area": pack(counts.sum(axis=1))}

    def score(rule, metric="miou", rest=-1):
        examples = EvalExamples(
            None,
            "val",
            (0,),
            ("background", "nucleus", "membrane"),
            ((0,), (1,), (2,)),
            metric,
            rest=rest,
        )
        return Scores(examples, "exhaustive", (row,), rule).of_an_image

    assert score("detectron2", "asked", rest=0) == 6 / 8
    assert score("detectron2") == pytest.approx((0.9 + 6 / 8) / 2)
    assert score("mmseg") == pytest.approx((0.9 + 6 / 8 + 0) / 3)
    assert score("official") == score("mmseg")  # most classes are in no single image

    # Nothing that was asked for is in it: it is neither the best nor the worst.
    counts[1] = 0
    row = {"confusion": pack(counts), "area": pack(counts.sum(axis=1))}
    assert np.isnan(score("detectron2", "asked", rest=0)) and score("detectron2") == 0.9


def test_the_worst_image_of_a_domain_is_the_one_whose_things_are_missed(tmp_path, monkeypatch):
    """By a mean with the background, small things that are missed would hardly count."""
    write(tmp_path / "mine", "0: background\n1: thing\n", count=12)
    for i in range(12):
        label = np.zeros((8, 9), np.uint8)
        label[0, : 1 + i % 3] = 1
        image = np.zeros((8, 9, 3), np.uint8)
        image[..., 0] = 200 * label
        if i == 7:
            image[...] = 0  # all of a small thing is missed, and nothing else is wrong
        if i == 4:
            label[4:] = 1  # half of a large one is found, so that the background is wrong, too
            image[4:6, :, 0] = 200
        Image.fromarray(image).save(tmp_path / f"mine/images/val/{i}.png")
        Image.fromarray(label).save(tmp_path / f"mine/masks/val/{i}.png")
    monkeypatch.setattr(suite.domains, "DOMAINS", ())
    run(tmp_path, tmp_path / "out", Seen())
    gallery = json.loads((tmp_path / "out" / "domains" / "mine" / "gallery.json").read_text())
    by_name = {item["id"]: item for item in gallery["items"]}
    assert by_name["7"]["kind"] == "worst" and by_name["7"]["miou"] == 0.0
