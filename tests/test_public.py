# SPDX-License-Identifier: Apache-2.0
"""The public names: loaded when they are used, and with examples that run."""

from __future__ import annotations

import doctest
import functools
import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import digseg_jax as dj

ROOT = Path(__file__).parents[1]
LIBRARIES = ("jax", "flax", "optax", "orbax", "numpy", "PIL", "absl", "ml_collections")


def test_importing_the_package_loads_no_library():
    code = "import sys, digseg_jax; print([m for m in sys.argv[1:] if m in sys.modules])"
    command = [sys.executable, "-S", "-c", code, *LIBRARIES]  # -S: no .pth files, which import things
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_settings_and_data_are_had_without_jax():
    """A wrong key is told at once, as on the command line."""
    code = (
        "import sys, digseg_jax as dj; dj.load_config('quickstart', **{'train.steps': 3}); "
        "print('jax' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", dj.__all__)
def test_every_name_is_there_and_says_what_it_is(name):
    value = getattr(dj, name)
    assert name in dir(dj) and name in vars(dj)
    assert isinstance(value, str) or value.__doc__


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'load_segmentor'"):
        _ = dj.load_segmentor


def documented() -> list[object]:
    """The public functions and classes that have an example."""
    values = [getattr(dj, name) for name in dj.__all__]
    return [v for v in values if not isinstance(v, str) and ">>>" in (v.__doc__ or "")]


def test_most_of_them_have_an_example():
    without = {name for name in dj.__all__ if getattr(dj, name) not in documented()}
    assert without == {"__version__", "Config", "dataset_names", "load_component", "save_component"}


@pytest.fixture
def surroundings(cover, tmp_path, monkeypatch):
    """What the examples find: a working directory with photo.jpg, an image as an array, and the shipped
    weights, which are loaded once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dj, "load_segmenter", functools.cache(dj.load_segmenter))
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 56, 3)).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "photo.jpg")
    return {"dj": dj, "image": image}


def test_the_examples_run(surroundings):
    runner = doctest.DocTestRunner()
    for value in documented():
        for example in doctest.DocTestFinder(recurse=False).find(
            value, value.__name__, globs=dict(surroundings)
        ):
            runner.run(example)
    assert runner.summarize().failed == 0 and runner.tries >= 10


def test_the_python_of_the_readme_runs(surroundings, monkeypatch):
    """As it stands there, but for a smaller ensemble, and jobs that only check their arguments."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    if not blocks:
        pytest.skip("README.md shows no Python")
    for name in ("train", "evaluate", "export"):
        monkeypatch.setattr(dj, name, inspect.signature(getattr(dj, name)).bind)
    for block in blocks:
        block = re.sub(r"ensemble=\d+", "ensemble=1", re.sub(r"steps=\d+\)", "steps=1)", block))
        exec(compile(block, "README.md", "exec"), {"image": surroundings["image"]})
