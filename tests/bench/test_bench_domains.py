# SPDX-License-Identifier: Apache-2.0
"""What the generalist is compared with: trees, U-Nets and specialists of a domain, scored as it is."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import jaccard_score
from threadpoolctl import threadpool_limits

from digseg_jax.data.datasets.domains import DOMAINS
from digseg_jax.errors import UserError
from digseg_jax.evaluation.domains import domain_examples
from tests.bench import domain_specialists, domain_trees, foreign_names, labels, round_trip
from tests.bench.domain_scores import chosen_domains, mean_row, score

CELLS = next(domain for domain in DOMAINS if domain.name == "cells_wbc")


@pytest.fixture
def root(tmp_path):
    """Cells of two colors on gray, as the domain cells_wbc has them; one pixel in ten is unlabeled."""
    folder = tmp_path / "cells_wbc"
    for split, count in (("train", 6), ("val", 2)):
        for side in ("images", "masks"):
            (folder / side / split).mkdir(parents=True)
        for i in range(count):
            rng = np.random.default_rng(i)
            label = np.zeros((90, 100), np.uint8)
            cv2.circle(label, (int(rng.integers(30, 70)), 45), 25, 1, -1)
            cv2.circle(label, (int(rng.integers(40, 60)), 45), 10, 2, -1)
            colors = np.array([[128, 128, 128], [230, 150, 40], [40, 30, 200]], np.uint8)
            image = colors[label]
            label[rng.random(label.shape) < 0.1] = 255
            Image.fromarray(image).save(folder / f"images/{split}/{i}.png")
            Image.fromarray(label).save(folder / f"masks/{split}/{i}.png")
    (folder / "classes.txt").write_text("0: background\n1: cytoplasm\n2: nucleus\n")
    return tmp_path


def test_a_predictor_is_scored_at_the_size_of_the_labels(root):
    examples = domain_examples(CELLS, str(root), "val")
    sizes = []

    def predict(image):
        sizes.append(image.shape[:2])
        return 1 + (image[..., 2] > 150) - (np.ptp(image.astype(int), axis=-1) < 40)

    # At 45 rows each class is found up to the border pixels that the smaller size loses.
    row = score(examples, 45, predict)
    assert set(sizes) == {(45, 50)}
    true, found = [], []
    for i in range(len(examples)):
        small = cv2.resize(examples[i]["image"], (50, 45), interpolation=cv2.INTER_AREA)
        full = cv2.resize(predict(small).astype(np.uint8), (100, 90), interpolation=cv2.INTER_NEAREST)
        labeled = examples[i]["label"] >= 0
        true.append(examples[i]["label"][labeled])
        found.append(full[labeled])
    each = jaccard_score(np.concatenate(true), np.concatenate(found), labels=[1, 2], average=None)
    assert row["asked_miou"] == pytest.approx(each.mean())
    assert row["per_class"] == pytest.approx({"cytoplasm": each[0], "nucleus": each[1]})
    assert row["asked_miou"] > 0.8


def test_trees_learn_a_domain_and_a_missing_one_is_a_row(root, monkeypatch):
    monkeypatch.setattr(domain_trees, "ROUNDS", 5)
    monkeypatch.setattr(domain_trees, "TRAIN_PIXELS", 3000)
    with threadpool_limits(1):  # on busy cores several threads wait for one another, minutes long
        found = domain_trees.run(str(root), "val", 0, only=("cells_wbc", "retina_disc"))
    assert found["domains"]["cells_wbc"]["asked_miou"] > 0.8
    assert "missing" in found["domains"]["retina_disc"]
    assert found["mean"] == found["domains"]["cells_wbc"]["asked_miou"]


def test_every_class_that_a_crop_shows_is_measured_in_batches_of_one_size(root, monkeypatch):
    monkeypatch.setattr(round_trip, "BATCH", 2)
    sizes = []

    def gray_for_the_last(batch):
        sizes.append(len(batch))
        return np.concatenate([batch[:1], np.zeros_like(batch[1:])])

    # The image and two masks take two batches: of (image, mask) and of (mask, filling).
    row = round_trip._one(gray_for_the_last, CELLS, str(root), 2, 96)
    assert sizes == [2] * 4 and row["masks"] == 4
    assert row["image_error"] == 0.0 and row["mask_iou"] == 0.5


def test_the_mean_is_of_the_domains_that_were_there():
    assert mean_row({"a": {"asked_miou": 0.5}, "b": {"missing": "no"}}) == 0.5
    assert np.isnan(mean_row({"b": {"missing": "no"}}))


def test_an_unknown_domain_is_told_with_the_legal_ones():
    with pytest.raises(UserError, match=r"no domain moon; legal: photos_coco128, .*landcover"):
        chosen_domains(("cells_wbc", "moon"))
    assert [domain.name for domain in chosen_domains(("landcover", "camvid"))] == [
        "landcover",
        "camvid",
    ]
    assert len(chosen_domains(())) == len(DOMAINS)


def test_a_domain_is_asked_for_every_name_of_the_others_in_a_view_as_large_as_a_crop(root, monkeypatch):
    # CamVid's classes stand in no file, and the land cover's data is everywhere.
    asked = {}

    class Painter:
        """Paints a tenth of the rows for one name, all of them for another, nothing for the rest."""

        def seen_at(self, short_side):
            return self

        def asks_in(self, template):
            return ("{}",)

        def segment(self, requests, estep):
            (request,) = requests
            asked.setdefault(request.image.shape, request.queries)
            return [self]

        def alone(self, query):
            mask = np.zeros((10, 10))
            name = next(iter(asked.values()))[query]
            mask[: {"wetland": 1, "car": 10}.get(name, 0)] = 1.0
            return mask

    monkeypatch.setattr(foreign_names, "load_segmenter", lambda weights: Painter())
    only = ("cells_wbc", "retina_disc")
    found = foreign_names.run("assets:generalist", str(root), "val", 2, only)
    row = found["domains"]["cells_wbc"]
    ((shape, names),) = asked.items()

    # Short side 90, seen with 168 pixels: 128 of them are 69 of the image's own.
    assert shape == (69, 69, 3)
    assert len(set(names)) == len(names) == row["names"]
    assert {"wetland", "car", "sky"} < set(names) and not {"nucleus", "cytoplasm"} & set(names)
    assert list(row["worst"].items())[:2] == [("car", 1.0), ("wetland", pytest.approx(0.1))]
    assert row["above_half_a_percent"] == 2 and row["mean"] == pytest.approx(1.1 / len(names))
    assert "missing" in found["domains"]["retina_disc"] and found["mean"] == row["mean"]


@pytest.mark.slow
def test_a_specialist_is_trained_once_and_scored(root):
    def rows():
        return domain_specialists.run(str(root), str(root / "runs"), "val", 0, 2, ("cells_wbc",))

    first, again = rows()["domains"]["cells_wbc"], rows()["domains"]["cells_wbc"]
    assert first["steps"] == 2 and set(first["per_class"]) == {"cytoplasm", "nucleus"}
    assert again["asked_miou"] == first["asked_miou"] and again["minutes"] < first["minutes"]


def test_parts_of_the_labels_are_nested_and_keep_the_whole_val(root, tmp_path):
    def part(percent):
        target = tmp_path / "parts" / str(percent) / "cells_wbc"
        count = labels.write_part(root / "cells_wbc", target, percent, seed=3)
        trained = domain_examples(CELLS, str(target.parent), "train")
        assert len(trained) == count and len(domain_examples(CELLS, str(target.parent), "val")) == 2
        return {trained[i]["name"] for i in range(count)}

    assert part(1) < part(50) < part(100)
    assert [len(part_of) for part_of in (part(10), part(30))] == [1, 2]


def test_starts_differ_in_the_weights_and_the_rate_alone():
    recipes = [labels.configuration("cells_wbc", "DIR", s, 40, 1) for s in labels.STARTS]
    same = [(c.data, c.train, c.diffusion, c.loss, c.eval, c.seed) for c in recipes]
    assert all(other == same[0] for other in same)
    assert len({(c.model.unet, c.model.unet_init, c.optim.learning_rate) for c in recipes}) == 4


def test_a_killed_comparison_of_starts_goes_on_after_what_has_ended(root, tmp_path, monkeypatch):
    seen: list[tuple[str, int]] = []
    kill_at = [3]

    def one(domain, config, images):
        if len(seen) in kill_at:
            raise KeyboardInterrupt
        seen.append((config.model.unet_init, config.seed))
        return 0.5 + 0.1 * config.seed

    monkeypatch.setattr(labels, "one", one)
    journal = tmp_path / "labels.json"
    settings = ["cells_wbc"], ["random", "prior"], [50], 2
    with pytest.raises(KeyboardInterrupt):
        labels.run(str(root), journal, *settings, steps=4, images=2)
    kill_at.clear()
    found = labels.run(str(root), journal, *settings, steps=4, images=2)
    assert seen == [("random", 0), ("pretrained", 0), ("random", 1), ("pretrained", 1)]
    (row,) = found["rows"]
    assert row[:2] == ["cells_wbc", "50 %"]
    assert row[2:] == pytest.approx([0.55, 0.1 * 0.5**0.5] * 2)  # n - 1
    with pytest.raises(UserError, match='of {"steps": 4, "images": 2, "recipe": .*, not of'):
        labels.run(str(root), journal, *settings, steps=5, images=2)

    # A journal of other settings is refused, too.
    changed = labels.load_config

    def of_today(name, **settings):
        return changed(name, **settings | {"optim.ema_decay": 0.9})

    monkeypatch.setattr(labels, "load_config", of_today)
    with pytest.raises(UserError, match='of {"steps": 4, "images": 2, "recipe": .*, not of'):
        labels.run(str(root), journal, *settings, steps=4, images=2)


def test_a_share_that_one_seed_or_start_has_not_reached_has_a_dash():
    runs = {"cells_wbc 5 random 0": 0.5, "cells_wbc 5 prior 0": 0.6, "cells_wbc 10 prior 0": 0.7}
    table = labels.as_table({"facts": {"steps": 4}, "runs": runs})
    assert table["rows"] == [
        ["cells_wbc", "5 %", 0.5, None, 0.6, None],
        ["cells_wbc", "10 %", None, None, 0.7, None],
    ]


def test_a_start_that_is_none_is_told_with_the_legal_ones(root, tmp_path):
    with pytest.raises(UserError, match="--starts: zero unknown; legal: random, prior, "):
        labels.run(str(root), tmp_path / "x", ["cells_wbc"], ["zero"], [50], 1, 4, 2)
    with pytest.raises(UserError, match="--only: landcover unknown; legal: photos_coco128"):
        labels.run(str(root), tmp_path / "x", ["landcover"], ["prior"], [50], 1, 4, 2)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def test_logits_of_a_unet_have_the_size_of_the_image_whatever_it_is(torch):
    from tests.bench.domain_unets import UNet

    network = UNet(3, widths=(4, 8, 8, 8)).eval()
    for height, width in ((96, 96), (45, 50), (17, 33)):
        assert network(torch.zeros(1, 3, height, width)).shape == (1, 3, height, width)


@pytest.mark.usefixtures("torch")
def test_a_unet_has_about_the_parameters_of_the_generalist():
    from tests.bench.domain_unets import WIDTHS, UNet

    count = sum(p.numel() for p in UNet(2, WIDTHS).parameters())
    assert 0.95 < count / 6.07e6 < 1.05


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize(("sees", "minutes"), [("pixels", 0.15), ("decoded", 0.5), ("latents", 0.3)])
def test_a_unet_learns_a_domain(root, sees, minutes):
    from tests.bench import domain_unets

    only = ("cells_wbc",)
    found = domain_unets.run(str(root), "val", 0, minutes, only, widths=(4, 8), sees=sees)
    assert found["domains"]["cells_wbc"]["asked_miou"] > 0.3  # one class everywhere: 0.1
