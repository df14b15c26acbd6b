# SPDX-License-Identifier: Apache-2.0
"""Experiment files by path and by name."""

from __future__ import annotations

import pytest
import tiny

from digseg_jax.config.experiment import find_config, load_config, names
from digseg_jax.errors import UserError


def test_a_name_a_path_and_another_working_directory_give_the_same(tmp_path, monkeypatch):
    named = load_config("quickstart")
    monkeypatch.chdir(tmp_path)
    assert load_config("quickstart") == named == load_config("configs/quickstart.py")
    assert load_config(find_config("quickstart")) == named
    (tmp_path / "quickstart").write_text(
        "from digseg_jax.config.parse import default\n\n\ndef get_config():\n    return default()\n"
    )
    assert find_config("quickstart") == "quickstart"  # a file at that path comes first


def test_what_follows_a_colon_is_the_variant():
    assert load_config("camvid:sd21").model.unet != load_config("camvid").model.unet
    assert find_config("camvid:sd21").endswith("camvid.py:sd21")


def test_settings_replace_those_of_the_file():
    config = load_config("quickstart", **{"train.steps": 3, "eval.view_size": [64, 32], "seed": 2})
    assert (config.train.steps, config.eval.view_size, config.seed) == (3, (64, 32), 2)


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("quikstart", {}, "did you mean 'quickstart'"),
        ("no/such.py", {}, "no such file"),
        ("camvid:sd3", {}, "no version 'sd3'"),
        ("quickstart", {"train.stepz": 3}, "config.train.stepz: no such key; did you mean 'steps'"),
        ("quickstart", {"train.steps": "3"}, "config.train.steps='3': expected int"),
        ("quickstart", {"train": 3}, "config.train=3"),
    ],
)
def test_what_is_wrong_is_one_line(name, settings, told):
    with pytest.raises(UserError) as caught:
        load_config(name, **settings)
    assert told in tiny.one_line(caught.value)


def test_a_file_that_raises_is_one_line(tmp_path):
    (tmp_path / "bad.py").write_text("import no_such_module\n")
    with pytest.raises(UserError, match="cannot be loaded .ModuleNotFoundError") as caught:
        load_config(tmp_path / "bad.py")
    tiny.one_line(caught.value)
    assert "bad" not in names()
    (tmp_path / "bad.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(UserError, match="cannot be loaded .SystemExit: 0"):
        load_config(tmp_path / "bad.py")
    (tmp_path / "bad.py").write_text("def get_config():\n    pass\n")
    with pytest.raises(UserError, match="returns NoneType, not a configuration"):
        load_config(tmp_path / "bad.py")


def test_a_file_that_is_no_program_is_not_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="config.json: an experiment is a Python file"):
        find_config(tmp_path / "config.json")
