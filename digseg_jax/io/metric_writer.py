# SPDX-License-Identifier: Apache-2.0
"""Writes a run's metrics: metrics.jsonl, TensorBoard events and, if asked, Weights & Biases.

Only process 0 writes. `metrics.jsonl` is the record (one JSON object per line); the TensorBoard events
repeat it for people who like that viewer. In a bucket both are uploaded as whole files (`jsonl.py`);
each start of a run makes a new event file, and the viewer hides the steps that a resume has undone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import numbers
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsInt

import jax
import numpy as np

from digseg_jax.arraytypes import UInt8
from digseg_jax.errors import UserError
from digseg_jax.io import storage
from digseg_jax.io.events import EventFile
from digseg_jax.io.jsonl import Record, read_rows
from digseg_jax.io.storage import AnyPath, is_remote

METRICS_NAME = "metrics.jsonl"


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """Reads a metrics.jsonl file; values are numbers, or None for a value that was not finite.

    Raises:
      UserError: the file is missing or damaged (see `read_rows`).
    """
    return read_rows(storage.as_path(path))


def _plain(value: Any) -> float | int | None:
    """A JSON number for any scalar (Python, NumPy, JAX); None if it is not finite."""
    # Integers stay integers (NumPy's count as Integral too); everything else goes through float.
    if isinstance(value, numbers.Integral):
        return int(value)
    value = float(value)
    return value if math.isfinite(value) else None


def require_wandb(project: str) -> None:
    """Raises UserError if a project is named but the optional package is missing."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"config.logging.wandb={project!r} needs the package wandb, which is not installed: "
            "pip install wandb"
        )


def _wandb_run(project: str, workdir: AnyPath, local: Path) -> Any:
    """Opens the Weights & Biases run of this directory; a resumed training continues it."""
    require_wandb(project)
    import wandb

    # The identity is a hash of the directory, so that a resumed run finds it without a file of its own.
    place = str(workdir if is_remote(workdir) else workdir.absolute())
    identity = hashlib.sha256(place.encode()).hexdigest()[:16]
    return wandb.init(project=project, name=workdir.name, id=identity, dir=str(local), resume="allow")


class MetricWriter:
    """Appends metrics to WORKDIR/metrics.jsonl and to event files in WORKDIR/tensorboard.

    Args:
      workdir: the run's directory.
      truncate_after: the restored step on resume; later lines are dropped, so that a killed and resumed
        run has each step once. -1 drops every line; None keeps all.
      active: whether this process writes; by default only JAX process 0 does.
      wandb: project at Weights & Biases that gets the metrics too; "" for none.

    Raises:
      UserError: the record cannot be read or written, or `wandb` is not installed.
    """

    def __init__(
        self,
        workdir: Path | str,
        *,
        truncate_after: int | None = None,
        active: bool | None = None,
        wandb: str = "",
    ) -> None:
        self.active = jax.process_index() == 0 if active is None else active
        self.path = storage.as_path(workdir) / METRICS_NAME

        if not self.active:
            return

        self._record = Record(self.path, truncate_after)

        # In a bucket the event files are made in the record's local folder, and uploaded with it.
        mirror = self._record.mirror
        folder = mirror.local if mirror else self.path.parent

        purge = None if truncate_after is None else max(truncate_after + 1, 0)
        self._events = EventFile(folder / "tensorboard", purge_from=purge)
        self._wandb = _wandb_run(wandb, self.path.parent, folder) if wandb else None

    def write(self, step: SupportsInt, metrics: Mapping[str, Any]) -> None:
        """Writes scalars of one step; a value that is not finite becomes null.

        Raises:
          UserError: a metric is named "step", or the file cannot be written.
        """
        if "step" in metrics:
            raise UserError("metric name 'step' is taken by the step itself; choose another name")
        if not self.active:
            return

        # The record keeps the name of a value that is not finite, with null.
        values = {name: _plain(value) for name, value in metrics.items()}
        self._record.write({"step": int(step), **values})

        # The viewers get finite values only: they have no null.
        finite = {name: value for name, value in values.items() if value is not None}
        self._events.write(int(step), finite)
        if self._wandb is not None:
            self._wandb.log(finite, step=int(step))

    def write_images(self, step: int, images: Mapping[str, UInt8[np.ndarray, "h w 3"]]) -> None:
        """Gives RGB images of one step to the viewers, by name; the record has numbers only."""
        if not self.active:
            return
        self._events.write_images(step, images)
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(x) for name, x in images.items()}, step=step)

    def sync(self) -> None:
        """Returns when all lines are in their final place; raises UserError if a bucket refuses."""
        if self.active:
            self._events.flush()
            self._record.sync()

    def close(self) -> None:
        """Flushes and closes both files; safe to call twice."""
        self.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.active:
            # Cleared first, so that a second close does nothing.
            self.active = False
            self._events.close()

            if self._wandb is not None:
                self._wandb.finish()
            # Last: its final upload takes the event files along.
            self._record.leave(kind)
