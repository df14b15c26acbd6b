# SPDX-License-Identifier: Apache-2.0
"""The legend below an overlay: names in any script, and of any length."""

from __future__ import annotations

import numpy as np
import pytest

from digseg_jax.prediction.files import overlay
from digseg_jax.viz import fonts
from digseg_jax.viz.images import class_colors, legend

COLORS = class_colors(8)


@pytest.fixture
def bare(monkeypatch):
    """A machine without fonts: only Pillow's own is there."""
    monkeypatch.setattr(fonts, "FILES", ())


def test_the_legend_shows_each_color_and_wraps():
    names = [f"class {i}" for i in range(8)]
    wide, narrow = legend(names, COLORS, width=900), legend(names, COLORS, width=200)
    assert wide.shape[1] == 900
    assert narrow.shape[0] > wide.shape[0]
    for strip in (wide, narrow):
        seen = {tuple(c) for c in strip.reshape(-1, 3)}
        assert {tuple(c) for c in COLORS} <= seen


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        ("forêt", "foret"),
        ("fore\u0302t", "foret"),
        ("Bäume", "Baume"),
        ("森林", "#5"),
        ("лес", "#5"),
        ("the лес", "#5"),
        ("", ""),
    ],
)
def test_a_name_without_a_font_is_drawn_plainly_or_as_its_number(name, drawn):
    strip = legend([name], COLORS[:1], numbers=[5])
    np.testing.assert_array_equal(strip, legend([drawn], COLORS[:1]))


@pytest.mark.parametrize("name", ["forêt", "Bäume", "лес", "森林"])
def test_a_font_of_the_machine_that_has_the_letters_draws_them(name):
    text, font = fonts.fitting(name, 0, 13)
    if text == "#0":
        pytest.skip("no font here has these letters")
    if text != name:
        pytest.skip("no font here has accents")
    assert fonts.has(font, name) and font.getlength(name) > 0


@pytest.mark.usefixtures("bare")
def test_the_number_is_that_of_the_label_map():
    """Only the queries that won a pixel are listed; the number stays the index of the query."""
    image = np.zeros((4, 90, 3), np.uint8)
    label = np.full((4, 90), 2)
    got = overlay(image, ["water", "лес", "森林"], label, COLORS[:3])
    np.testing.assert_array_equal(got[4:], legend(["#2"], COLORS[2:3], width=90))


@pytest.mark.parametrize("name", ["a long name that no narrow image has room for", "лес " * 30])
@pytest.mark.parametrize("width", [60, 120, 240])
def test_a_name_that_is_too_long_is_cut_before_the_edge(name, width):
    strip = legend([name, "b"], COLORS[:2], width=width)
    assert (strip[:, -5:] == 255).all(), "the last letters touch the edge"
    assert (strip[:, : width // 2] < 100).any(), "nothing of the name is left"


def test_a_cut_name_says_so():
    text, font = fonts.fitting("a rather long name", 0, 13)
    assert fonts.shortened(text, font, 1000) == text
    cut = fonts.shortened(text, font, 60)
    assert cut.endswith(("…", "...")) and text.startswith(cut.rstrip("….")) and len(cut) > 4
    assert fonts.shortened(text, font, 1) == ""
    assert legend([text], COLORS[:1], width=6).shape[1] == 6
