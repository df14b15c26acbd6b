# SPDX-License-Identifier: Apache-2.0
"""Makes ddim.npz: 50-step trajectories of torch diffusers' DDIMScheduler.

Needs torch and diffusers: `python tests/golden/make_ddim.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
from ddim_cases import CASES, torch_trajectory
from oracle import GOLDEN


def main() -> None:
    """Writes the file beside this script."""
    trajectories = {name: torch_trajectory(case) for name, case in CASES.items()}
    np.savez_compressed(GOLDEN / "ddim.npz", **trajectories)


if __name__ == "__main__":
    main()
