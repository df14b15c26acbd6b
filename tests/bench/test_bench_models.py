# SPDX-License-Identifier: Apache-2.0
"""`bench models`: both sides compute the same, ratios are ours over torch's, torch may be missing."""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest

from digseg_jax.errors import UserError
from digseg_jax.models.unet import UNetConfig
from digseg_jax.models.vae import VaeConfig
from tests.bench import __main__ as command
from tests.bench import models


def test_full_size_is_stable_diffusion():
    assert UNetConfig.from_dict(models.UNET["full"]) == UNetConfig()
    assert VaeConfig.from_dict(models.VAE["full"]) == VaeConfig()
    assert [x.shape for x in models.inputs("unet", "full")] == [(1, 4, 64, 64), (1,), (1, 77, 768)]
    assert [x.shape for x in models.inputs("vae_encode", "full")] == [(1, 3, 512, 512)]
    assert [x.shape for x in models.inputs("vae_decode", "full")] == [(1, 4, 64, 64)]


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=[] if c == "unet" else pytest.mark.slow) for c in models.CASES],
)
def test_both_sides_compute_the_same(case):
    pytest.importorskip("torch")
    result = models.run("small", cases=(case,), repeats=1)
    row = result["cases"][case]
    assert row["relative_l2"] <= 1e-5
    for name in models.PASSES[:2]:
        ours, theirs = row[name]["ours"], row[name]["torch"]
        assert row[name]["ratio"] == ours["seconds"] / theirs["seconds"]
        assert ours["cpu_seconds"] > 0 and theirs["cpu_seconds"] > 0
    assert row["forward_backward"]["torch"]["seconds"] > row["forward"]["torch"]["seconds"]


def fake_worker(module, spec):
    """Torch takes 2 and 4 s, ours 3 s; the outputs differ by 1 %."""
    side, scale = ("torch", 1.0) if module == "models_torch" else ("ours", 1.01)
    np.save(f"{spec['folder']}/{side}.npy", np.full((2, 2), scale))
    seconds = (2.0, 4.0) if side == "torch" else (3.0, 3.0)
    times = {"seconds": seconds[0], "cpu_seconds": 1.0}, {"seconds": seconds[1], "cpu_seconds": 1.0}
    measured = dict(zip(models.PASSES[:2], times, strict=True))
    measured["train_step"] = times[0] | {"loss": scale}
    return {name: measured[name] for name in spec["passes"]} | {"compile_seconds": 9.0}


@pytest.fixture
def with_torch(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name in ("torch", "diffusers") or find_spec(name)
    )


def test_json_alone_goes_to_standard_output(monkeypatch, capsys, with_torch):
    monkeypatch.setattr(models, "_worker", fake_worker)
    monkeypatch.setattr(sys, "argv", ["bench", "models", "--json", "--case=unet", "--threads=1"])
    assert command.main() == 0
    result = json.loads(capsys.readouterr().out)
    row = result["cases"].pop("unet")
    assert not result["cases"] and result["threads"] == 1 and result["size"] == "full"
    assert row["forward"]["ratio"] == 1.5 and row["forward_backward"]["ratio"] == 0.75
    assert row["relative_l2"] == pytest.approx(0.01)


def test_forward_only_leaves_the_backward_pass_out(monkeypatch, capsys, with_torch):
    monkeypatch.setattr(models, "_worker", fake_worker)
    command_line = ["bench", "models", "--json", "--case=vae_decode", "--forward-only"]
    monkeypatch.setattr(sys, "argv", command_line)
    assert command.main() == 0
    row = json.loads(capsys.readouterr().out)["cases"]["vae_decode"]
    assert row["forward"]["ratio"] == 1.5 and "forward_backward" not in row


def test_a_failed_side_is_told_by_name(capfd):
    with pytest.raises(UserError, match="models_torch ended with status 1 in case 'none'"):
        models._worker("models_torch", {"case": "none", "threads": 1})
    assert "Error" in capfd.readouterr().err


def test_missing_torch_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["bench", "models", "--json"])
    assert command.main() == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: bench models needs torch and diffusers")
    assert err.endswith("pip install torch diffusers\n") and err.count("\n") == 1


def test_both_sides_train_the_same():
    pytest.importorskip("torch")
    steps = 3
    result = models.run("small", cases=("unet",), passes=("forward", "train_step"), repeats=steps)
    row = result["cases"]["unet"]
    assert row["train_step"]["loss_difference"] < 1e-4 and row["train_step"]["ratio"] > 0


def test_bench_train_compares_the_losses_too(monkeypatch, capsys, with_torch):
    monkeypatch.setattr(models, "_worker", fake_worker)
    monkeypatch.setattr(sys, "argv", ["bench", "train", "--json", "--cells=16"])
    assert command.main() == 0
    row = json.loads(capsys.readouterr().out)["cases"]["unet"]
    assert row["train_step"]["ratio"] == 1.5 and "forward_backward" not in row
    assert row["train_step"]["loss_difference"] == pytest.approx(0.01)


@pytest.mark.parametrize("job", ["models", "train"])
@pytest.mark.parametrize("flag", ["--threads=0", "--repeats=-1"])
def test_impossible_numbers_are_refused(monkeypatch, capsys, flag, job):
    monkeypatch.setattr(sys, "argv", ["bench", job, flag])
    assert command.main() == 2
    assert f"{flag}: must be at least 1" in capsys.readouterr().err
