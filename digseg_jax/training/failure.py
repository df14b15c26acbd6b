# SPDX-License-Identifier: Apache-2.0
"""WORKDIR/failure/STEP: everything that repeats a step whose loss was not finite.

`failure.json` names the step, the seed and the checkpoint to start from; `batch_P.npz` has process P's
rows of the batch. `python -m digseg_jax.tools.replay --workdir=DIR` repeats the step.
"""

from __future__ import annotations

import io
import json
from typing import Any

import jax
import numpy as np
from etils import epath

from digseg_jax.errors import UserError
from digseg_jax.io.json_file import read_json
from digseg_jax.training.train_log import NotFinite

FOLDER = "failure"
REPLAY = "repeat it with: python -m digseg_jax.tools.replay --workdir={workdir}"


def save_failure(
    workdir: str, error: NotFinite, batch: dict[str, np.ndarray], seed: int, checkpoint: int
) -> epath.Path:
    """Writes this process's rows of the batch, and on the first process the record; returns the folder.

    Args:
      workdir: the run's directory.
      error: names the step, with its metrics.
      batch: this process's rows of that step's batch.
      seed: of the run.
      checkpoint: the step to start the replay from; 0 is the initial state.
    """
    folder = epath.Path(workdir) / FOLDER / str(error.step)
    folder.mkdir(parents=True, exist_ok=True)

    # Through a buffer, because NumPy cannot write to a bucket.
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **batch)  # type: ignore[arg-type]  # no array is named as an option
    (folder / f"batch_{jax.process_index()}.npz").write_bytes(buffer.getvalue())

    if jax.process_index() == 0:
        values = {
            "step": error.step,
            "seed": seed,
            "checkpoint": checkpoint,
            # As text: JSON has neither NaN nor infinity.
            "metrics": {name: repr(value) for name, value in error.metrics.items()},
            "processes": jax.process_count(),
            "replay": REPLAY.format(workdir=workdir),
        }
        (folder / "failure.json").write_text(json.dumps(values, indent=2) + "\n")
    return folder


def load_failure(workdir: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Loads the latest failure's record and its whole batch, each example once, in the stream's order.

    Raises:
      UserError: no failure was saved here, or a process's rows of the batch are missing.
    """
    root = epath.Path(workdir) / FOLDER
    steps = [int(p.name) for p in root.iterdir() if p.name.isdigit()] if root.exists() else []
    if not steps:
        raise UserError(f"{root}: no failed step was saved here")

    folder = root / str(max(steps))
    values = read_json(folder / "failure.json", {"processes": int, "step": int})

    # Gather the rows of all processes.
    parts = []
    for process in range(values["processes"]):
        path = folder / f"batch_{process}.npz"
        if not path.exists():
            raise UserError(f"{path}: missing; it is process {process}'s part of the batch")
        parts.append(dict(np.load(io.BytesIO(path.read_bytes()))))
    batch = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    # Processes along the tensor axis were fed the same rows: keep each example once.
    _, rows = np.unique(batch["index"], return_index=True)
    return values, {key: value[rows] for key, value in batch.items()}
