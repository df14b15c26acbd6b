# SPDX-License-Identifier: Apache-2.0
"""What is told when a run's target or schedule is not the one that its U-Net was trained with."""

from __future__ import annotations

import json
import logging

import pytest
import tiny
from hub import layouts

from digseg_jax.config.parse import parse
from digseg_jax.config.schema import DiffusionConfig
from digseg_jax.recipes import stable_diffusion
from digseg_jax.training.tasks.segmentation import SegmentationTask
from digseg_jax.weights.scheduler import schedule_differences


@pytest.fixture
def unet(tmp_path):
    (tmp_path / "unet").mkdir()
    return tmp_path / "unet"


def put(unet, values) -> None:
    folder = unet.parent / "scheduler"
    folder.mkdir(exist_ok=True)
    text = values if isinstance(values, str) else json.dumps(values)
    (folder / "scheduler_config.json").write_text(text)


def differences(unet, version: str) -> list[str]:
    return schedule_differences(unet, parse(stable_diffusion(version, "ade20k")).diffusion)


def test_stable_diffusion_15_was_trained_for_another_target(unet):
    put(unet, layouts.SD15["scheduler"])
    assert differences(unet, "sd15") == [
        "config.diffusion.prediction_type='v_prediction', trained with 'epsilon'",
        "config.diffusion.zero_snr=True, trained with False",
    ]
    assert differences(unet, "sd15_epsilon") == []


def test_the_second_family_differs_in_the_last_timestep_alone_and_marigold_not_at_all(unet):
    put(unet, layouts.SD21["scheduler"])
    assert differences(unet, "sd21") == ["config.diffusion.zero_snr=True, trained with False"]
    assert differences(unet, "marigold_recipe_v1") == []
    put(unet, layouts.MARIGOLD["scheduler"])
    assert differences(unet, "marigold") == differences(unet, "marigold_recipe") == []


def test_other_betas_are_named(unet):
    other = {"beta_schedule": "linear", "beta_end": 0.02, "trained_betas": [0.1] * 1000}
    put(unet, layouts.SD21["scheduler"] | other)
    told = "; ".join(schedule_differences(unet, DiffusionConfig(zero_snr=False)))
    assert (
        "beta_end is 0.012 here, trained with 0.02" in told
        and "'scaled_linear' here, trained with 'linear'" in told
        and "trained_betas is None here, trained with [0.1, 0.1" in told
    )


@pytest.mark.parametrize("text", ["{", "[]", None, pytest.param("[" * 100_000, id="deep")])
def test_where_nothing_is_known_nothing_is_told(unet, text):
    if text is not None:
        put(unet, text)
    assert schedule_differences(unet, DiffusionConfig()) == []


def test_it_is_one_line_at_the_start_of_a_training(folders, tmp_path, caplog):
    unet = tmp_path / "unet"
    unet.symlink_to(folders["unet"], target_is_directory=True)
    put(unet, layouts.SD15["scheduler"])
    config = tiny.config(folders, model__unet=str(unet))
    trainer = tiny.trainer(config, SegmentationTask(config), tiny.mesh(), tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        trainer._initial_params()
    (line,) = [r.getMessage() for r in caplog.records if "trained with" in r.getMessage()]
    assert line.startswith(f"{unet}: config.diffusion.prediction_type=") and "\n" not in line
