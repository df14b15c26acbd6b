# SPDX-License-Identifier: Apache-2.0
"""A record of the examples that a run has seen: WORKDIR/examples/PROCESS.jsonl.

A line is one step of one process: {"step", "index": the examples' global numbers, "crc": checksums of
their images, or of the images' latents where a cache supplies those}. It proves, example by example,
that a run that was killed and resumed on other hosts saw the same data as one that ran undisturbed.
Written if `config.logging.examples` is set.
"""

from __future__ import annotations

import zlib
from typing import Any

import jax
import numpy as np

from digseg_jax.io.jsonl import Record, cut
from digseg_jax.io.storage import AnyPath
from digseg_jax.runtime.distributed import is_main

FOLDER = "examples"


class ExampleLog:
    """Appends this process's rows of every batch, from the restored step `start` on."""

    def __init__(self, workdir: AnyPath, start: int, active: bool) -> None:
        self._record: Record | None = None
        if not active:
            return

        folder = workdir / FOLDER
        name = f"{jax.process_index()}.jsonl"

        # An earlier start may have had more processes. Nobody opens their files now, so the main
        # process cuts off the steps that are trained again.
        if is_main() and folder.exists():
            for path in folder.iterdir():
                if path.suffix == ".jsonl" and int(path.stem) >= jax.process_count():
                    cut(path, start)

        self._record = Record(folder / name, truncate_after=start)

    def __enter__(self) -> ExampleLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self._record:
            self._record.leave(kind)
            self._record = None

    def add(self, step: int, batch: dict[str, np.ndarray]) -> None:
        """Writes one step's line.

        Args:
          step: the step that the batch is for.
          batch: this host's rows: "index" [b], and "image" [b, h, w, c] or "image_latent".
        """
        if self._record:
            # A latent cache supplies latents instead of images.
            images = batch["image"] if "image" in batch else batch["image_latent"]
            rows = [np.ascontiguousarray(image) for image in images]
            crc = [zlib.crc32(row) for row in rows]  # type: ignore[arg-type]  # buffers; stubs know from 3.12 on
            self._record.write({"step": step, "index": batch["index"].tolist(), "crc": crc})

    def sync(self) -> None:
        """Makes the lines so far durable, as `Record.sync` does."""
        if self._record:
            self._record.sync()
