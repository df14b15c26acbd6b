# SPDX-License-Identifier: Apache-2.0
"""The data benchmark measures what it says: the same images, whole pipelines, real rates."""

from __future__ import annotations

import sys
from functools import partial

import numpy as np
import pytest
from PIL import Image

from digseg_jax.errors import UserError
from digseg_jax.tools.prepare_data import prepare_split
from tests.bench import data


@pytest.fixture(scope="module")
def folder(cover, tmp_path_factory):
    path = tmp_path_factory.mktemp("bench")
    data.write_images(path, 4)
    return path


def test_the_images_are_of_one_size_and_show_land(folder):
    names = sorted(p.stem for p in (folder / "images").iterdir())
    assert len(names) == 4
    for name in names:
        label = np.asarray(Image.open(folder / "annotations" / f"{name}.png"))
        assert Image.open(folder / "images" / f"{name}.jpg").size == (data.WIDTH, data.HEIGHT)
        assert label.shape == (data.HEIGHT, data.WIDTH) and (label == 0).mean() <= 0.5


def test_rates_come_from_the_real_pipeline(folder, tmp_path):
    prepare_split(partial(data.open_folder, folder), data.SPEC, "train", tmp_path)
    with data.open_stream(tmp_path, 0) as batches:
        batch = next(batches)
    assert batch["image"].shape == (data.BATCH, data.SIZE, data.SIZE, 3)
    assert data.per_core(tmp_path, 32) > 0
    rates = data.limit(folder, 1)
    assert rates.keys() == {"limit_opencv", "limit_pillow"} and min(rates.values()) > 0


def test_an_interpreter_without_torch_is_told(folder, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with pytest.raises(UserError, match="--torch-python=.*no torch here"):
        data.torch_rate(str(python), folder, 16)
