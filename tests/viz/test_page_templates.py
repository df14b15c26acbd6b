# SPDX-License-Identifier: Apache-2.0
"""Templates: what they refuse, how numbers are shown, and that a wheel carries them."""

from __future__ import annotations

import tomllib
from pathlib import Path

import jinja2
import pytest

from digseg_jax.viz.templates import render, render_part

ROOT = Path(__file__).parents[2]
PARTS = "viz/parts.html.j2"


def test_a_template_must_be_given_all_that_it_shows():
    with pytest.raises(jinja2.UndefinedError, match="'steps' is undefined"):
        render("report/live.html.j2", name="a", run="b", refresh=0, step=1, gallery=None, charts=None)


def test_numbers_are_rounded_and_carry_their_value_and_texts_are_escaped():
    assert (
        render_part(PARTS, "number", 0.123456) == '<data value="0.123456" title="0.123456">0.123</data>'
    )
    assert ">1,234,567<" in render_part(PARTS, "number", 1234567)
    assert ">0.0123<" in render_part(PARTS, "significant", 0.01234)
    for nothing in (None, float("nan"), True, "3"):
        assert "–" in render_part(PARTS, "number", nothing)
    assert render_part(PARTS, "cell", "<b>&") == "&lt;b&gt;&amp;"


def test_a_wheel_carries_every_template_and_what_it_takes_in():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    carried = {
        path
        for package, patterns in options["package-data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    package = ROOT / "digseg_jax"
    wanted = {p for end in ("j2", "css", "js") for p in package.rglob(f"*.{end}")}
    assert len(wanted) > 15 and wanted <= carried
