# SPDX-License-Identifier: Apache-2.0
"""How a mask is sampled: E members, S steps, the spacing of timesteps."""

from __future__ import annotations

import dataclasses
import re

from digseg_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class EStep:
    """E members, S sampling steps, timestep spacing; written "8x2" or "20x50:leading"."""

    ensemble: int
    steps: int
    spacing: str = "trailing"

    @classmethod
    def parse(cls, text: str) -> EStep:
        """Raises UserError unless the text looks like 8x2 or 8x2:leading."""
        match = re.fullmatch(r"(\d+)x(\d+)(?::(trailing|leading))?", text)
        if not match or min(int(match[1]), int(match[2])) < 1:
            raise UserError(f"E-Step {text!r}: expected ExS or ExS:leading, such as 8x2")
        return cls(int(match[1]), int(match[2]), match[3] or "trailing")

    def __str__(self) -> str:
        suffix = "" if self.spacing == "trailing" else f":{self.spacing}"
        return f"{self.ensemble}x{self.steps}{suffix}"
