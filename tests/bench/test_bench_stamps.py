# SPDX-License-Identifier: Apache-2.0
"""Scores of masks by name, from masks that are known."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from tiny import one_line

from digseg_jax.errors import UserError
from tests.bench import stamps
from tests.bench.stamp_scores import score_scene, score_scenes, summary
from tests.bench.stamp_sheet import Answered, sheet

NAMES = ("background", "cow", "owl", "bus", "tram")


def square(top, left, side=4):
    mask = np.zeros((16, 16), bool)
    mask[top : top + side, left : left + side] = True
    return mask


COW, OWL = square(0, 0), square(8, 8)


def test_right_answers():
    rows = score_scene(np.stack([COW, OWL, np.zeros_like(COW)]), np.stack([COW, OWL]))
    right = {"matching": 1, "other": 0, "absent": 0, "absent_share": 0, "found": 1, "pointing": 1}
    assert rows == [right, right]


def test_swapped_answers_and_one_for_an_absent_name():
    rows = score_scene(np.stack([OWL, COW, COW | OWL]), np.stack([COW, OWL]))
    wrong = {"matching": 0, "other": 1, "absent": 0.5, "absent_share": 32 / 256, "found": 0,
             "pointing": 0}  # fmt: skip
    assert rows == [wrong, wrong]


def test_everything_covered_points_at_nothing_smaller():
    whole = np.ones_like(COW)
    big = square(6, 6, 10)
    rows = score_scene(np.stack([whole] * 3), np.stack([COW, big]))
    assert [row["pointing"] for row in rows] == [0, 1]
    assert rows[0]["matching"] == pytest.approx(16 / 256)


def test_a_mask_on_two_objects_alike_points_at_neither():
    rows = score_scene(np.stack([COW | OWL, OWL, COW & OWL]), np.stack([COW, OWL]))
    assert [row["pointing"] for row in rows] == [0, 1]
    assert rows[0]["matching"] == 0.5 and rows[0]["found"] == 0  # a half is not above a half


def test_half_of_an_object_and_of_a_third_one():
    third = square(0, 8)
    half = square(0, 0) & (np.arange(16) < 2)
    rows = score_scene(np.stack([half, COW, COW, COW]), np.stack([COW, OWL, third]))
    assert [row["matching"] for row in rows] == [0.5, 0, 0]
    assert [row["other"] for row in rows] == [1, 0, 0]
    assert [row["absent"] for row in rows] == [1, 0, 0]


def test_an_object_alone_has_no_other_name():
    rows = score_scene(np.stack([COW, OWL]), COW[None])
    assert rows[0]["pointing"] == 1 and np.isnan(rows[0]["other"])
    result = summary([{"name": "cow", "scene": 0} | rows[0]])
    assert result["other"] is None and json.loads(json.dumps(result, allow_nan=False)) == result
    assert stamps.table({"seen": result, "unseen": result}).splitlines()[1].split()[5] == "-"


def scenes(count):
    label = np.zeros((16, 16), np.int32)
    label[COW], label[OWL] = 1, 2
    return iter([{"image": np.zeros((16, 16, 3), np.uint8), "label": label}] * count)


def test_scenes_are_asked_for_their_names_and_one_that_is_absent():
    asked = []

    def ask(image, names, index):
        asked.append(names)
        return np.stack([COW, OWL, np.zeros_like(COW)]).astype(np.float32)

    rows = score_scenes(scenes(4), NAMES, ask)
    assert all(names[:2] == ["cow", "owl"] and names[2] in ("bus", "tram") for names in asked)
    assert len({names[2] for names in asked}) == 2
    assert [(row["name"], row["scene"]) for row in rows[:3]] == [("cow", 0), ("owl", 0), ("cow", 1)]
    again, asked = asked, []
    score_scenes(scenes(4), NAMES, ask)
    assert asked == again
    result = summary(rows)
    assert (result["scenes"], result["objects"], result["matching"]) == (4, 8, 1.0)
    assert result["per_name"] == {"cow": 1.0, "owl": 1.0}
    text = stamps.table({"seen": result, "unseen": result})
    assert text.splitlines()[1].split()[:4] == ["seen", "2", "8", "1.000"]


def row(name, scene, matching, share):
    other = {"other": 0.0, "absent": 0.0, "found": 0.0, "pointing": 0.0}
    return {"name": name, "scene": scene, "matching": matching, "absent_share": share} | other


def test_means_are_over_objects_of_shares_over_scenes_and_the_error_over_names():
    rows = [row("cow", 0, 1.0, 0.3), row("owl", 0, 0.5, 0.3), row("cow", 1, 0.0, 0.1)]
    found = summary(rows)
    assert found["matching"] == 0.5 and found["absent_share"] == pytest.approx(0.2)
    assert found["per_name"] == {"cow": 0.5, "owl": 0.5} and found["error"] == 0.0
    found = summary([row("cow", 0, 1.0, 0.0), row("owl", 0, 0.0, 0.0)])
    assert found["error"] == pytest.approx(0.5)  # deviation sqrt(1/2), two names


def test_a_probability_of_a_half_is_no_mask():
    rows = score_scenes(scenes(1), NAMES, lambda *_: np.full((3, 16, 16), 0.5))
    assert {r["matching"] for r in rows} == {0.0} and {r["absent_share"] for r in rows} == {0.0}


def test_the_sheet_shows_each_name_beside_its_scene():
    answers = np.stack([COW, COW, OWL])
    image = np.zeros((16, 16, 3), np.uint8)
    page = np.asarray(sheet([Answered("a", image, ["x", "y", "z"], answers, np.stack([COW, OWL]))]))
    cells = [page[16:160, i * 150 : i * 150 + 144] for i in range(4)]
    assert not cells[0].any()  # the scene itself
    assert cells[1][18, 18].tolist() == [127, 0, 40]  # a mask on black
    assert not cells[2][90, 90].any() and cells[3][90, 90].any()


def test_bad_input_is_told_before_any_model_is_built(tmp_path):
    def told(**changes):
        given = {"weights": str(tmp_path), "root": tmp_path, "estep": "1x1", "images": 1}
        with pytest.raises(UserError) as caught:
            stamps.run(**(given | changes))
        return one_line(caught.value)

    assert "--images=-1" in told(images=-1)
    assert "no seen/classes.txt" in told()
    with pytest.raises(UserError, match="no scene"):
        summary([])
    with pytest.raises(UserError, match="none is absent"):
        score_scenes(scenes(1), NAMES[:3], lambda *_: np.zeros((3, 16, 16)))
    page = [Answered("a", np.zeros((4, 4, 3), np.uint8), [], np.zeros((0, 4, 4)), np.zeros((0, 4, 4)))]
    with pytest.raises(UserError, match="--sheet="):
        stamps._save_sheet(page, tmp_path / "no" / "folder.png")
    stamps._save_sheet(page, tmp_path / "page.png")
    assert Image.open(tmp_path / "page.png").size[0] == 150
