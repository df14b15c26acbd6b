# SPDX-License-Identifier: Apache-2.0
"""Scores of masks by name, from masks that are known."""

from __future__ import annotations

import numpy as np
import pytest

from digseg_jax.bench import stamps

NAMES = ("background", "cow", "owl", "bus", "tram")


def square(top, left, side=4):
    mask = np.zeros((16, 16), bool)
    mask[top : top + side, left : left + side] = True
    return mask


COW, OWL = square(0, 0), square(8, 8)


def test_right_answers():
    rows = stamps.score_scene(np.stack([COW, OWL, np.zeros_like(COW)]), np.stack([COW, OWL]))
    right = {"matching": 1, "other": 0, "absent": 0, "absent_share": 0, "found": 1, "pointing": 1}
    assert rows == [right, right]


def test_swapped_answers_and_one_for_an_absent_name():
    rows = stamps.score_scene(np.stack([OWL, COW, COW | OWL]), np.stack([COW, OWL]))
    wrong = {"matching": 0, "other": 1, "absent": 0.5, "absent_share": 32 / 256, "found": 0,
             "pointing": 0}  # fmt: skip
    assert rows == [wrong, wrong]


def test_everything_covered_points_at_nothing_smaller():
    whole = np.ones_like(COW)
    big = square(6, 6, 10)
    rows = stamps.score_scene(np.stack([whole] * 3), np.stack([COW, big]))
    assert [row["pointing"] for row in rows] == [0, 1]
    assert rows[0]["matching"] == pytest.approx(16 / 256)


def test_scenes_are_asked_for_their_names_and_one_that_is_absent():
    label = np.zeros((16, 16), np.int32)
    label[COW], label[OWL] = 1, 2
    scenes = [{"image": np.zeros((16, 16, 3), np.uint8), "label": label}] * 4
    asked = []

    def ask(picture, names, index):
        asked.append(names)
        return np.stack([COW, OWL, np.zeros_like(COW)]).astype(np.float32)

    result = stamps.score_scenes(iter(scenes), NAMES, ask)
    assert all(names[:2] == ["cow", "owl"] and names[2] in ("bus", "tram") for names in asked)
    assert len({names[2] for names in asked}) == 2
    assert (result["scenes"], result["objects"], result["matching"]) == (4, 8, 1.0)
    assert result["per_name"] == {"cow": 1.0, "owl": 1.0}
    text = stamps.table({"seen": result, "unseen": result})
    assert text.splitlines()[1].split()[:2] == ["seen", "1.000"]
