# SPDX-License-Identifier: Apache-2.0
"""What comparisons with torch share: each side runs in a process of its own and prints its times."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

import numpy as np

from digseg_jax.errors import UserError


def require_torch(job: str, *others: str) -> None:
    """Raises UserError if torch or one of the other packages is not installed."""
    names = ("torch", *others)
    if missing := [name for name in names if not importlib.util.find_spec(name)]:
        raise UserError(
            f"bench {job} needs {' and '.join(missing)}, to compare with: pip install {' '.join(names)}"
        )


def run_side(module: str, spec: dict[str, Any], job: str, where: str) -> dict[str, Any]:
    """Runs `python -m tests.bench.MODULE SPEC`; returns the JSON of its last line.

    Raises:
        UserError: it failed; `where` says at what.
    """
    command = [sys.executable, "-m", f"tests.bench.{module}", json.dumps(spec)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"bench {job}: {module} ended with status {done.returncode} in {where}; "
            "its own message is above (-9: out of memory)"
        )
    return json.loads(done.stdout.splitlines()[-1])


def relative_l2(ours: np.ndarray, theirs: np.ndarray) -> float:
    """|ours - theirs| / |theirs|, in float64."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
