# SPDX-License-Identifier: Apache-2.0
"""Trajectories of torch diffusers' DDIMScheduler with a made-up network, for test and golden file."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from oracle import seeded_input

STEPS = 50


@dataclasses.dataclass(frozen=True)
class Case:
    """One sampler setting; torch's shortcuts are right where the steps divide the timesteps."""

    prediction_type: str
    zero_snr: bool
    spacing: str


CASES = {
    "trailing_v_zero_snr": Case("v_prediction", True, "trailing"),
    "leading_epsilon": Case("epsilon", False, "leading"),
    "trailing_sample": Case("sample", False, "trailing"),
}


def noise() -> np.ndarray:
    """The start, NHWC [2, 4, 6, 3]."""
    return seeded_input("ddim noise", (2, 4, 6, 3))


def network(x: Any, t: Any, xp: Any) -> Any:
    """A smooth prediction of x at timestep t, in NumPy or JAX."""
    return 0.6 * xp.tanh(x) + 0.3 * xp.cos(0.01 * t + 2.0 * x)


def torch_scheduler(case: Case) -> Any:
    """diffusers' scheduler with Stable Diffusion's betas, and a last step that returns x0."""
    import diffusers

    return diffusers.DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=case.prediction_type,
        rescale_betas_zero_snr=case.zero_snr,
        timestep_spacing=case.spacing,
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # as in the scheduler files of Stable Diffusion
    )


def torch_trajectory(case: Case) -> np.ndarray:
    """x before each of the 50 steps and after the last, [51, 2, 4, 6, 3]."""
    import torch

    scheduler = torch_scheduler(case)
    scheduler.set_timesteps(STEPS)
    states = [noise()]
    for t in scheduler.timesteps.tolist():
        x = states[-1]
        prediction = torch.from_numpy(network(x, np.float32(t), np))
        states.append(scheduler.step(prediction, t, torch.from_numpy(x)).prev_sample.numpy())
    return np.stack(states)
