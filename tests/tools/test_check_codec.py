# SPDX-License-Identifier: Apache-2.0
"""The round trip of both codecs, with an autoencoder that changes nothing and with a real tiny one."""

from __future__ import annotations

import json

import numpy as np
import pytest

from digseg_jax.tools import check_codec
from digseg_jax.training.tasks.parts import Vae


class Identity(Vae):
    """Latents are cells' mean colors and a constant: flat cells come back exactly."""

    def encode(self, params, image):
        b, h, w, c = image.shape
        return image.reshape(b, h // 8, 8, w // 8, 8, c).mean(axis=(2, 4))

    def decode(self, params, latent):
        return latent.repeat(8, axis=1).repeat(8, axis=2)


class Config:
    factor = 8


def labels(cell, n=3):
    rng = np.random.default_rng(0)
    size = 64 // cell
    maps = rng.integers(-1, 11, (n, size, size)).repeat(cell, 1).repeat(cell, 2)
    return [{"label": m.astype(np.int32)} for m in maps]


def check(cell, classes=11):
    return check_codec.check(Identity(None, Config()), {}, labels(cell), classes, 3)


def test_what_the_autoencoder_keeps_both_codecs_keep():
    result = check(cell=8)
    for name in ("binary", "palette"):
        assert result["codecs"][name]["accuracy"] == result["codecs"][name]["miou"] == 1.0
    assert result["images"] == 3 and result["probe_r2"] == pytest.approx(1.0, abs=1e-3)
    assert "palette" in check_codec.table(result)


def test_what_it_blurs_is_lost():
    result = check(cell=2)
    assert all(scores["accuracy"] < 0.7 for scores in result["codecs"].values())


def test_847_classes_have_no_palette():
    result = check(cell=8, classes=847)
    assert set(result["codecs"]) == {"binary", "binary_probe"}


def test_the_command_tells_a_wrong_data_set_in_one_line(capsys):
    assert check_codec.main(["--data=landcovr"]) == 2
    assert "no data set 'landcovr'" in capsys.readouterr().err


def test_the_command_on_a_real_tiny_autoencoder(folders, cover, capsys, tmp_path):
    out = tmp_path / "check.json"
    arguments = [f"--vae={folders['vae']}", "--images=1", "--json", f"--out={out}"]
    assert check_codec.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(out.read_text())
    assert len(result["palette"]["colors"]) == 8 and result["split"] == "test"
