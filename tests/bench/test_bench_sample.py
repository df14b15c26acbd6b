# SPDX-License-Identifier: Apache-2.0
"""`bench sample`: both sides compute the same masks, ratios are ours over torch's, errors are told."""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest

from digseg_jax.models.unet import UNetConfig
from tests.bench import __main__ as command
from tests.bench import sample


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["bench", "sample", "--json", *flags])
    return command.main()


@pytest.fixture
def with_torch(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name in ("torch", "diffusers") or find_spec(name)
    )


def fake_side(difference):
    """Torch takes 4 s, ours 3 s; the masks differ by a share of theirs."""

    def run_side(module, spec, job, where):
        side, scale = ("torch", 1.0) if module == "sample_torch" else ("ours", 1.0 + difference)
        for row in spec["rows"]:
            np.save(f"{spec['folder']}/{side}_{row}.npy", scale * np.arange(4.0).reshape(1, 2, 2))
        seconds = 4.0 if side == "torch" else 3.0
        return {row: {"seconds": seconds, "cpu_seconds": 5.0} for row in spec["rows"]}

    return run_side


def test_full_size_is_stable_diffusion_with_an_image_beside():
    ours = UNetConfig.from_dict(sample.unet_config("full", 256))
    assert ours == UNetConfig(in_channels=8, sample_size=32)
    arrays = sample.inputs("full", 256, 2)
    assert arrays["image"].shape == (1, 256, 256, 3) and arrays["tokens"].shape == (2, 77, 768)


def test_both_sides_compute_the_same_masks(monkeypatch, capsys, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    out = tmp_path / "sample.json"
    flags = ("--size=small", "--pixels=32", "--rows=3x2,2x2:leading", "--queries=2", "--repeats=1")
    assert run(monkeypatch, *flags, "--torch-batch=2", f"--out={out}") == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == result
    row, leading = result["rows"].pop("3x2"), result["rows"].pop("2x2:leading")
    assert leading["relative_l2"] <= sample.LIMIT
    assert not result["rows"] and result["pixels"] == 32 and result["queries"] == 2
    assert row["relative_l2"] <= sample.LIMIT
    assert row["mask_deviation"] > 0.01  # else a constant would agree as well
    assert row["ratio"] == row["ours"]["seconds"] / row["torch"]["seconds"]
    for side in ("ours", "torch"):
        assert row[side]["images_per_second"] == pytest.approx(1 / row[side]["seconds"])
    assert row["ours"]["compile_seconds"] > 0


def test_rows_are_read_and_repeats_named(monkeypatch, capsys, with_torch):
    monkeypatch.setattr(sample, "run_side", fake_side(1e-6))
    assert run(monkeypatch, "--rows=1x1,8x2,1x1", "--repeats=5") == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["rows"]) == ["1x1", "8x2"] and result["repeats"] == 5
    assert result["schedule"]["prediction_type"] == "v_prediction" and result["pixels"] == 256
    assert result["rows"]["8x2"]["ratio"] == 0.75
    assert result["rows"]["8x2"]["relative_l2"] == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("difference", "flags", "message"),
    [
        (1e-3, (), "masks of row 1x1 differ, relative L2 1.00e-03"),
        (float("nan"), (), "masks of row 1x1 differ, relative L2 nan"),
        (0.0, ("--pixels=96",), "--pixels=96: must be a multiple of 64 for the full size"),
        (0.0, ("--rows=1x1,two",), "E-Step 'two': expected ExS"),
        (0.0, ("--queries=0",), "--queries=0: must be at least 1"),
        (0.0, ("--torch-batch=0",), "--torch-batch=0: must be at least 1"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    monkeypatch, capsys, with_torch, difference, flags, message
):
    monkeypatch.setattr(sample, "run_side", fake_side(difference))
    assert run(monkeypatch, "--rows=1x1", *flags) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_missing_torch_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(monkeypatch) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: bench sample needs torch and diffusers")
    assert err.count("\n") == 1
