# SPDX-License-Identifier: Apache-2.0
"""The sampler against torch diffusers: live where torch is installed, else stored trajectories."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ddim_cases import CASES, STEPS, Case, network, noise, torch_scheduler, torch_trajectory
from oracle import GOLDEN, relative_l2

from digseg_jax.diffusion.ddim import sample, timesteps
from digseg_jax.diffusion.schedule import Schedule, make_schedule

LIMIT = 1e-5  # relative L2, after every one of the 50 steps


def schedule_of(case: Case) -> Schedule:
    kind = case.prediction_type
    return make_schedule(1000, 0.00085, 0.012, zero_snr=case.zero_snr, prediction_type=kind)


def our_trajectory(case: Case) -> np.ndarray:
    states = []

    def denoise(x, t):
        jax.debug.callback(lambda x: states.append(np.asarray(x)), x, ordered=True)
        return network(x, t[:, None, None, None].astype(jnp.float32), jnp)

    last = sample(denoise, noise(), schedule_of(case), steps=STEPS, spacing=case.spacing)
    jax.effects_barrier()
    return np.stack([*states, last])


def compare(case: Case, expected: np.ndarray) -> None:
    for step, (got, want) in enumerate(zip(our_trajectory(case), expected, strict=True)):
        assert relative_l2(got, want) <= LIMIT, step


@pytest.mark.parametrize("name", list(CASES))
def test_fifty_steps_follow_the_stored_trajectory(name):
    compare(CASES[name], np.load(GOLDEN / "ddim.npz")[name])


@pytest.mark.parametrize("name", list(CASES))
def test_fifty_steps_live(name):
    pytest.importorskip("torch")
    compare(CASES[name], torch_trajectory(CASES[name]))


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 50])
def test_timesteps_are_torchs(steps, spacing):
    pytest.importorskip("torch")
    scheduler = torch_scheduler(Case("v_prediction", True, spacing))
    scheduler.set_timesteps(steps)
    np.testing.assert_array_equal(timesteps(1000, steps, spacing), scheduler.timesteps.numpy())


@pytest.mark.parametrize("zero_snr", [False, True])
def test_noising_and_target_are_torchs(zero_snr):
    torch = pytest.importorskip("torch")
    case = Case("v_prediction", zero_snr, "trailing")
    theirs, ours = torch_scheduler(case), schedule_of(case)
    x0, eps = noise(), noise()[::-1].copy()
    for t in (0, 321, 998, 999):
        at = torch.tensor([t, t])
        pair = torch.from_numpy(x0), torch.from_numpy(eps)
        noised = theirs.add_noise(*pair, at).numpy()
        velocity = theirs.get_velocity(*pair, at).numpy()
        assert relative_l2(ours.add_noise(x0, eps, np.array([t, t])), noised) <= LIMIT
        assert relative_l2(ours.target(x0, eps, np.array([t, t])), velocity) <= LIMIT
