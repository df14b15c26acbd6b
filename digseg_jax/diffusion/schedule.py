# SPDX-License-Identifier: Apache-2.0
"""The noise schedule: betas, zero-terminal-SNR rescaling, noising, and what a U-Net predicts.

Conventions: x0 is the clean (scaled) latent, x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps,
v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0 (diffusers: `scheduling_ddpm.py`, `scheduling_ddim.py`).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from digseg_jax.arraytypes import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The signal that is left at each of the T training timesteps, and what the network predicts.

    alphas_cumprod: abar_t as float64; a tuple, so that a schedule is hashable and can be a static
      argument of a jitted function.
    """

    alphas_cumprod: tuple[float, ...]
    prediction_type: str  # "epsilon" | "v_prediction" | "sample"

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def signal_and_noise(self, t: Int[Array, "b"]) -> tuple[Array, Array]:
        """Returns sqrt(abar_t) and sqrt(1 - abar_t), shaped [b, 1, 1, 1], float32."""
        table = np.asarray(self.alphas_cumprod)
        signal = jnp.asarray(np.sqrt(table), jnp.float32)[t]
        noise = jnp.asarray(np.sqrt(1.0 - table), jnp.float32)[t]
        return signal[:, None, None, None], noise[:, None, None, None]

    def add_noise(
        self, x0: Float[Array, "b h w c"], eps: Float[Array, "b h w c"], t: Int[Array, "b"]
    ) -> Float[Array, "b h w c"]:
        """Noises clean latents: x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps."""
        signal, noise = self.signal_and_noise(t)
        return signal * x0 + noise * eps

    def target(
        self, x0: Float[Array, "b h w c"], eps: Float[Array, "b h w c"], t: Int[Array, "b"]
    ) -> Float[Array, "b h w c"]:
        """The training target for the schedule's prediction type."""
        if self.prediction_type == "epsilon":
            return eps
        if self.prediction_type == "sample":
            return x0
        signal, noise = self.signal_and_noise(t)
        return signal * eps - noise * x0

    def x0_and_eps(
        self, prediction: Float[Array, "b h w c"], x: Float[Array, "b h w c"], t: Int[Array, "b"]
    ) -> tuple[Array, Array]:
        """Solves for the clean latent and the noise that a prediction at x_t implies."""
        signal, noise = self.signal_and_noise(t)
        if self.prediction_type == "epsilon":
            return (x - noise * prediction) / signal, prediction
        if self.prediction_type == "sample":
            # at t = 0 there is hardly any noise to solve for; 1e-8 only avoids 0 / 0
            return prediction, (x - signal * prediction) / jnp.maximum(noise, 1e-8)
        return signal * x - noise * prediction, signal * prediction + noise * x


# Stable Diffusion's betas, of the first and of the last timestep.
BETA_START, BETA_END = 0.00085, 0.012


def make_schedule(
    num_timesteps: int, beta_start: float, beta_end: float, *, zero_snr: bool, prediction_type: str
) -> Schedule:
    """Builds a schedule of scaled-linear betas.

    zero_snr: shift and scale sqrt(abar) so that the last one is exactly 0.

    Source of the rescaling: arXiv 2305.08891, algorithm 1.

    Raises:
      ValueError: epsilon prediction with zero_snr, which leaves x0 undefined at the last timestep.
    """
    if prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"prediction_type {prediction_type!r}: epsilon, v_prediction or sample")
    if zero_snr and prediction_type == "epsilon":
        raise ValueError("epsilon prediction is undefined at the last timestep with zero_snr")

    # Linear in the square root, in float64: the product of 1000 factors follows.
    betas = np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=np.float64) ** 2
    alphas_cumprod = np.cumprod(1.0 - betas)

    # Keep the first value and move the last one to 0, so that training sees pure noise.
    if zero_snr:
        root = np.sqrt(alphas_cumprod)
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        alphas_cumprod = root**2
    return Schedule(tuple(alphas_cumprod.tolist()), prediction_type)
