# SPDX-License-Identifier: Apache-2.0
"""Keys of earlier versions: their runs and exports are read, and who types one is told the new name."""

from __future__ import annotations

import json

import pytest
from tiny import one_line

from digseg_jax.config.experiment import load_config
from digseg_jax.config.parse import check_key, parse, to_dict, with_settings
from digseg_jax.config.renamed import CONSTANT, MOVED, hint, with_current_names
from digseg_jax.config.schema import settings
from digseg_jax.errors import UserError
from digseg_jax.io.workdir import CONFIG_NAME, claim, stored_config

# an earlier version's configuration: no key of it lies where it lies today
OLD = {
    "seed": 3,
    "data": {"workers": 2, "on_error": "skip", "train_split": "trainval", "image_size": 96},
    "model": {"conv": "xla", "vae_limit": 4, "vae_arch": {"kl_weight": 5e-4}},
    "diffusion": {"mask_loss_weight": 0.2, "num_train_timesteps": 1000, "high_noise_a": 0.1},
    "segmentation": {"codec": "binary"},
    "train": {"steps": 600, "log_every": 5, "accumulation": 2},
    "optim": {"b1": 0.9},
    "checkpoint": {"every": 50, "overlap": 7},
    "eval": {"gallery": 3},
}


def stored(folder, values):
    (folder / CONFIG_NAME).write_text(json.dumps(values))
    (folder / "metrics.jsonl").write_text("{}\n")  # trained already
    return folder


def test_what_moved_is_where_it_is_said_to_be_and_nowhere_else():
    known = {*settings(), "vae_arch", "unet_arch"}
    assert set(MOVED.values()) <= known
    assert not (MOVED.keys() | CONSTANT.keys()) & known


def test_an_earlier_runs_configuration_is_read(tmp_path):
    config = stored_config(stored(tmp_path, OLD))
    assert config.seed == 3 and config.data.image_size == 96 and config.data.split == "trainval"
    assert config.loading.workers == 2 and config.loading.on_error == "skip"
    assert config.compute.conv == "xla" and config.compute.vae_batch == 4
    assert config.compute.accumulation == 2 and config.logging.every == 5
    assert config.loss.mask_weight == 0.2 and config.train.steps == 600


def test_an_earlier_run_goes_on_and_gets_the_new_names(tmp_path):
    stored(tmp_path, OLD)
    now = with_settings(parse(with_current_names(OLD)), {"logging.every": 100})
    claim(tmp_path, to_dict(now))
    assert json.loads((tmp_path / CONFIG_NAME).read_text()) == to_dict(now)


def test_a_change_of_an_earlier_run_is_told_under_the_new_name(tmp_path):
    stored(tmp_path, OLD)
    now = with_settings(parse(with_current_names(OLD)), {"loss.mask_weight": 0.3})
    with pytest.raises(UserError, match="loss.mask_weight: 0.2 -> 0.3"):
        claim(tmp_path, to_dict(now))


def test_a_run_with_another_value_of_a_constant_is_another_run(tmp_path):
    stored(tmp_path, OLD | {"optim": {"b1": 0.8}})
    with pytest.raises(UserError, match="optim.b1: 0.8 -> 0.9"):
        claim(tmp_path, to_dict(parse(with_current_names(OLD))))
    with pytest.raises(UserError, match="config.optim.b1 is no longer a setting: it is 0.9"):
        stored_config(tmp_path)


@pytest.mark.parametrize("stored", [{}, {"data": 3}, {"data": {"workers": 1}, "loading": True}, OLD])
def test_what_was_read_stays_as_it_was(stored):
    before = json.dumps(stored)
    again = with_current_names(with_current_names(stored))
    assert again == with_current_names(stored) and json.dumps(stored) == before


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("train.log_every", "config.train.log_every is now config.logging.every"),
        ("model.vae_arch.kl_weight", "config.model.vae_arch is now config.vae_arch"),
        ("segmentation.codec", "config.segmentation.codec is now config.model.codec"),
        ("optim.b1", "config.optim.b1 is no longer a setting: it is 0.9 in every run"),
    ],
)
def test_an_old_key_on_the_command_line_is_answered_with_the_new_one(key, expected):
    with pytest.raises(UserError) as caught:
        check_key(f"config.{key}")
    assert one_line(caught.value) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("config.train.log_every = 1", "config.train.log_every is now config.logging.every"),
        ("config.model.vae_arch.kl_weight = 1.0", "config.model.vae_arch is now config.vae_arch"),
        (
            "config.segmentation.codec = 'palette'",
            "config.segmentation.codec is now config.model.codec",
        ),
        (
            "config.diffusion.update(high_noise_a=1.0)",
            "config.diffusion.high_noise_a is no longer a setting",
        ),
        ("config.train.stepz = 1", 'Key "stepz" does not exist'),
    ],
)
def test_an_old_key_in_an_experiment_file_is_answered_with_the_new_one(line, expected, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from digseg_jax.config import default\n\n\ndef get_config():\n"
        f"    config = default()\n    {line}\n    return config\n"
    )
    with pytest.raises(UserError) as caught:
        load_config(file)
    assert expected in one_line(caught.value)


def test_what_never_was_a_key_gets_no_hint():
    assert hint("train.stepz") == hint("eval") == hint("") == ""
