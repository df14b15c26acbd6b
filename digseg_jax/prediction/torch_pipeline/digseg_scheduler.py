# SPDX-License-Identifier: Apache-2.0
"""DDIM sampling as in digseg_jax: the same timesteps, last step, and initial noise for a seed."""

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # bits, Threefry-2x32 (Salmon et al. 2011)


class DigsegScheduler(DDIMScheduler):
    """DDIM from each timestep of the list to the next; the last step returns the predicted x0."""

    def step(self, model_output, timestep, sample, **_):
        """One deterministic step (eta = 0) from `timestep` to the next smaller one of the list."""
        later = self.timesteps[self.timesteps < timestep]
        signal = self.alphas_cumprod.to(sample.device)
        a, b = signal[timestep].sqrt(), (1 - signal[timestep]).sqrt()  # sample = a * x0 + b * eps

        # Clean latent and noise that the U-Net's output stands for.
        kind = self.config.prediction_type
        if kind == "v_prediction":
            x0, eps = a * sample - b * model_output, a * model_output + b * sample
        elif kind == "epsilon":
            x0, eps = (sample - b * model_output) / a, model_output
        else:
            x0, eps = model_output, (sample - a * model_output) / b.clamp(min=1e-8)

        # Renoise to the next timestep of the list, which need not be T / n below this one.
        x = x0
        if len(later):
            x = signal[later[0]].sqrt() * x0 + (1 - signal[later[0]]).sqrt() * eps
        return DDIMSchedulerOutput(prev_sample=x, pred_original_sample=x0)

    def initial_noise(self, seed, view, ensemble, shape):
        """Standard normal noise [ensemble, c, h, w] as in digseg_jax, by (seed, view, member)."""
        members = [self._member(seed, view, member, shape) for member in range(ensemble)]
        return torch.from_numpy(np.stack(members))

    def _member(self, seed, view, member, shape):
        """Noise [c, h, w] of one member: `jax.random.normal` with its key, computed in NumPy."""
        # The seed's two words are a key; folding in a number hashes it with the key.
        channels, height, width = shape
        key = (seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF)
        for number in (view, member):
            key = [
                word[0] for word in threefry(key, np.zeros(1, np.uint32), np.full(1, number, np.uint32))
            ]

        # 23 random bits are the mantissa of a float in [1, 2), which becomes uniform in (-1, 1).
        counter = np.arange(channels * height * width, dtype=np.uint32)
        first, second = threefry(key, np.zeros_like(counter), counter)
        uniform = ((first ^ second) >> 9 | np.uint32(0x3F800000)).view(np.float32) - np.float32(1)
        least = np.nextafter(np.float32(-1), np.float32(0))
        uniform = np.maximum(least, uniform * (np.float32(1) - least) + least)

        # Inverse of the normal distribution function; digseg_jax draws with channels last.
        normal = np.float32(np.sqrt(2)) * torch.erfinv(torch.from_numpy(uniform)).numpy()
        return normal.reshape(height, width, channels).transpose(2, 0, 1)


def threefry(key, x, y):
    """Threefry-2x32 with 20 rounds (Salmon et al. 2011), JAX's generator: two words of random bits.

    key: two uint32 numbers. x, y: the counter's words, uint32 arrays.
    """
    # Sums are modulo 2^32, so overflow is intended.
    with np.errstate(over="ignore"):
        keys = [np.uint32(key[0]), np.uint32(key[1])]
        keys.append(keys[0] ^ keys[1] ^ np.uint32(0x1BD11BDA))
        x, y = x + keys[0], y + keys[1]
        for i in range(5):
            for r in ROTATIONS[i % 2]:
                x = x + y
                y = x ^ (y << np.uint32(r) | y >> np.uint32(32 - r))
            x, y = x + keys[(i + 1) % 3], y + keys[(i + 2) % 3] + np.uint32(i + 1)
    return x, y
