# SPDX-License-Identifier: Apache-2.0
"""Compares the scheduler of a pipeline on the hub, with which its U-Net was trained, with a run's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from digseg_jax.config.sampling import NUM_TRAIN_TIMESTEPS
from digseg_jax.config.schema import DiffusionConfig
from digseg_jax.diffusion.schedule import BETA_END, BETA_START
from digseg_jax.errors import UserError
from digseg_jax.io.json_file import read_json
from digseg_jax.weights.hub import SCHEDULER_FILE

# diffusers' name -> key of config.diffusion, and diffusers' default, which a file may leave out.
_KEYS: dict[str, tuple[str, Any]] = {
    "prediction_type": ("prediction_type", "epsilon"),
    "rescale_betas_zero_snr": ("zero_snr", False),
}
# diffusers' name -> value that every run has here, and diffusers' default.
_CONSTANTS: dict[str, tuple[Any, Any]] = {
    "num_train_timesteps": (NUM_TRAIN_TIMESTEPS, 1000),
    "beta_schedule": ("scaled_linear", "linear"),
    "beta_start": (BETA_START, 0.0001),
    "beta_end": (BETA_END, 0.02),
    "trained_betas": (None, None),  # a list of them, in place of the four above
}


def schedule_differences(unet: Path, config: DiffusionConfig) -> list[str]:
    """Lists, in words, where a configuration differs from the scheduler beside a U-Net.

    Args:
      unet: folder of the U-Net.
      config: the run's diffusion.

    Returns:
      One text per difference. The list is empty if they agree, and also if there is no readable
      scheduler: then nothing is known.
    """
    # A comparison for a warning only, so a missing or damaged file is no error.
    beside = unet.absolute().parent / SCHEDULER_FILE
    own = unet / Path(SCHEDULER_FILE).name  # converted weights have it in their folder
    try:
        stored = read_json(beside if beside.is_file() else own)
    except UserError:
        return []

    # What a run can choose, then what is the same in every run.
    told = []
    for theirs, (ours, default) in _KEYS.items():
        trained, wanted = stored.get(theirs, default), getattr(config, ours)
        if trained != wanted:
            told.append(f"config.diffusion.{ours}={wanted!r}, trained with {trained!r}")
    for theirs, (here, default) in _CONSTANTS.items():
        if (trained := stored.get(theirs, default)) != here:
            told.append(f"{theirs} is {here!r} here, trained with {repr(trained)[:60]}")
    return told
