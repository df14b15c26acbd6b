# SPDX-License-Identifier: Apache-2.0
"""How a mask is sampled: number of ensemble members, steps, and the spacing of timesteps."""

from __future__ import annotations

import dataclasses
import re

from digseg_jax.errors import UserError

NUM_TRAIN_TIMESTEPS = 1000  # T of Stable Diffusion, and so the most denoising steps


@dataclasses.dataclass(frozen=True)
class EStep:
    """One way to sample (the paper's E-Step), written "8x2" or "20x50:leading".

    Attributes:
      ensemble: number of members, each denoised from its own noise.
      steps: denoising steps per member.
      spacing: how the timesteps are spaced, "trailing" or "leading", as in diffusers.
    """

    ensemble: int
    steps: int
    spacing: str = "trailing"

    @classmethod
    def parse(cls, text: str) -> EStep:
        """Parses a text such as 8x2 or 8x2:leading.

        Raises:
          UserError: another form, a number below 1, or more steps than there are timesteps.
        """
        match = re.fullmatch(r"(\d+)x(\d+)(?::(trailing|leading))?", text)
        if not match or min(int(match[1]), int(match[2])) < 1:
            raise UserError(f"E-Step {text!r}: expected ExS or ExS:leading, such as 8x2")
        if int(match[2]) > NUM_TRAIN_TIMESTEPS:
            raise UserError(
                f"E-Step {text!r}: at most {NUM_TRAIN_TIMESTEPS} steps, the timesteps of the training"
            )

        return cls(int(match[1]), int(match[2]), match[3] or "trailing")

    def __str__(self) -> str:
        suffix = "" if self.spacing == "trailing" else f":{self.spacing}"
        return f"{self.ensemble}x{self.steps}{suffix}"
