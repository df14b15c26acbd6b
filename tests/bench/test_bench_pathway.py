# SPDX-License-Identifier: Apache-2.0
"""The pathways' benchmark: another encoder of the same knowledge; its file is a table of the report."""

from __future__ import annotations

import numpy as np
import pytest

from digseg_jax.report.sections import bench_tables
from digseg_jax.segmentation.prompt_bank import encode_prompts
from digseg_jax.viz.templates import render_part
from digseg_jax.weights import load_text_tower
from tests.bench import pathway


def test_a_rotated_encoder_keeps_every_angle_between_tokens(folders):
    def tokens(tower):
        parts = tower.graphdef, tower.params, tower.tokenizer
        return encode_prompts(*parts, ("water", "snow and ice"), max_length=6).tokens.reshape(12, -1)

    tower = load_text_tower(folders["text"])
    before, after = tokens(tower), tokens(pathway.rotated(tower))
    assert after.shape[-1] == pathway.WIDTH > before.shape[-1]
    np.testing.assert_allclose(after @ after.T, before @ before.T, rtol=1e-4, atol=1e-4)
    assert np.abs(after[:, : before.shape[-1]] - before).max() > 0.1


def test_its_file_is_a_table_of_the_report():
    found = [{"miou": 0.25, "accuracy": 0.5}, {"miou": 0.35, "accuracy": 0.5}]
    runs = {"own encoder, adapter": found, "own encoder, parallel": found}
    table = pathway.as_table({"steps": 250, "seeds": 2, "estep": "1x1", "runs": runs})
    assert table["rows"][1][1:3] == pytest.approx([0.3, 0.1 * 0.5**0.5])  # n - 1
    text = render_part("report/sections.html.j2", "benches", bench_tables([table]))
    assert "own encoder, parallel" in text and "250 steps" in text
