# SPDX-License-Identifier: Apache-2.0
"""What checkpoints cost: how long a save holds up training, and restoring against plain reading."""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from digseg_jax.arraytypes import Params
from digseg_jax.config.schema import CheckpointConfig, Config, MeshConfig
from digseg_jax.errors import UserError
from digseg_jax.io.checkpoint import Checkpointer, abstract_with_shardings
from digseg_jax.models import functional
from digseg_jax.models.unet import UNet2DConditionModel, UNetConfig
from digseg_jax.runtime.sharding import infer_shardings, make_mesh, place, place_batch
from digseg_jax.training.loop import Trainer
from digseg_jax.training.setup import Setup
from digseg_jax.training.tasks.segmentation import SegmentationTask

INTERVAL = 50  # steps between two saves
GB = 1e9


def run(part: str, saves: int) -> dict[str, Any]:
    """part: "save", "restore" or "both"."""
    result: dict[str, Any] = {}
    if part != "restore":
        result["save"] = save(saves)
    if part != "save":
        result["restore"] = restore()
    return result


def save(saves: int) -> dict[str, Any]:
    """Trains the default segmenter and saves `saves` times, with INTERVAL steps from one to the next.

    `overhead` is the time that the save calls and the slower steps after them add to an interval, as
    a share of the interval without a save. The process's first save, which compiles, comes before.
    """
    base = Config()
    config: Config = dataclasses.replace(base, train=dataclasses.replace(base.train, batch_size=8))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Setup(config, SegmentationTask(config), make_mesh(config.mesh)), folder)
        with Checkpointer(folder, CheckpointConfig()) as checkpointer:
            _, state = trainer.start_state(checkpointer)
            batch = place_batch(next(trainer.batches(0)), trainer.mesh)

            def interval(state: Any, saved: int = 0) -> tuple[Any, float]:
                start = time.monotonic()
                for step in range(saved + 1, saved + 1 + INTERVAL):
                    state, metrics = trainer.step_fn(state, trainer.frozen, batch)
                    checkpointer.check(step)
                jax.block_until_ready(metrics)
                return state, time.monotonic() - start

            state, _ = interval(state)  # compiles
            start = time.monotonic()
            checkpointer.save(1, state, {})  # compiles too, once a process
            first = time.monotonic() - start
            plain, saving, calls = [], [], []
            for step in range(INTERVAL, (saves + 1) * INTERVAL, INTERVAL):
                checkpointer.wait()
                state, seconds = interval(state)
                plain.append(seconds)
                start = time.monotonic()
                checkpointer.save(step, state, {})
                calls.append(time.monotonic() - start)
                state, seconds = interval(state, step)
                saving.append(calls[-1] + seconds)
    quiet = statistics.median(plain)
    return {
        "interval_steps": INTERVAL,
        "saves": saves,
        "state_gb": _bytes(trainer.abstract_state) / GB,
        "step_seconds": quiet / INTERVAL,
        "first_call_seconds": first,
        "save_call_seconds": statistics.median(calls),
        "save_call_share": statistics.median(calls) / quiet,
        "overhead": statistics.median(saving) / quiet - 1.0,
    }


def restore(unet: UNetConfig | None = None) -> dict[str, Any]:
    """Writes a full-size Stable Diffusion 1.5 U-Net in float32 and restores it onto one device.

    `ratio` is the time of the restore over that of reading the same files from the disk; both start
    with the files out of the page cache.

    Raises:
      UserError: the disk has no room for it.
    """
    _, abstract = functional.abstract(
        lambda: UNet2DConditionModel(unet or UNetConfig(), rngs=functional.FixedRngs())
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    shardings = infer_shardings(abstract, mesh)
    with tempfile.TemporaryDirectory() as folder:
        _check_room(Path(folder), 2 * _bytes(abstract))
        _write(Path(folder), place(functional.random_init(abstract, 0), shardings))
        files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
        size = sum(p.stat().st_size for p in files)
        reading, restoring = [], []
        for _ in range(3):
            _drop_from_cache(files)
            start = time.monotonic()
            _read(files)
            reading.append(time.monotonic() - start)
            _drop_from_cache(files)
            start = time.monotonic()
            with Checkpointer(folder, CheckpointConfig()) as checkpointer:
                part = {"params": abstract_with_shardings(abstract, shardings)}
                jax.block_until_ready(checkpointer.restore(part))
            restoring.append(time.monotonic() - start)
    return {
        "parameters": sum(int(np.prod(x.shape)) for x in jax.tree.leaves(abstract)),
        "files_gb": size / GB,
        "read_seconds": statistics.median(reading),
        "restore_seconds": statistics.median(restoring),
        "ratio": statistics.median(restoring) / statistics.median(reading),
    }


def _write(folder: Path, params: Params) -> None:
    with Checkpointer(str(folder), CheckpointConfig()) as checkpointer:
        checkpointer.save(1, {"params": params}, {})
    os.sync()


def _read(files: list[Path]) -> None:
    buffer = memoryview(bytearray(16 * 2**20))
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _drop_from_cache(files: list[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _check_room(folder: Path, needed: int) -> None:
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < needed:
        raise UserError(
            f"{folder}: {free / GB:.1f} GB free, {needed / GB:.1f} needed; TMPDIR names another place"
        )


def _bytes(tree: Any) -> int:
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
