# SPDX-License-Identifier: Apache-2.0
"""TensorBoard's event files: a copy of the metrics for a viewer, which must never stop a run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from digseg_jax.arraytypes import UInt8
from digseg_jax.log import log

FLUSH_EVERY = 10.0  # seconds


class EventFile:
    """Appends scalars and images to a new event file in a folder.

    Written by the calling thread: tensorboardX's `SummaryWriter` has a thread of its own, which dies on
    a full disk and leaves the training loop waiting for its queue. Here the first failure is one
    warning, and nothing more is written.

    Args:
      folder: made if it is absent.
      purge_from: the viewer hides the events of earlier files from this step on; None hides none.
    """

    def __init__(self, folder: Path, purge_from: int | None = None) -> None:
        # Imported here: the import is slow, and only the writing process needs it.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self.folder, self._flushed, self._writer = folder, time.monotonic(), None
        with self._one_warning():
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"))

            # A session start is how TensorBoard knows that later steps of older files are obsolete.
            if purge_from is not None:
                start = SessionLog(status=SessionLog.START)
                self._writer.write_event(
                    Event(step=purge_from, wall_time=time.time(), session_log=start)
                )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends finite scalars of one step; they are on disk `FLUSH_EVERY` seconds later at most."""
        if self._writer is None:
            return

        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        with self._one_warning():
            for name, value in values.items():
                event = Event(step=step, wall_time=time.time(), summary=scalar(name, value))
                self._writer.write_event(event)

            # Each flush is a write to the disk: not at every step.
            if time.monotonic() - self._flushed > FLUSH_EVERY:
                self.flush()

    def write_images(self, step: int, images: Mapping[str, UInt8[np.ndarray, "h w 3"]]) -> None:
        """Appends RGB images of one step, by name."""
        if self._writer is None:
            return

        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import image

        with self._one_warning():
            for name, pixels in images.items():
                summary = image(name, pixels, dataformats="HWC")
                self._writer.write_event(Event(step=step, wall_time=time.time(), summary=summary))
            self.flush()

    def flush(self) -> None:
        """Writes what is still in memory."""
        if self._writer is not None:
            self._flushed = time.monotonic()
            with self._one_warning():
                self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the file; safe to call twice."""
        # Cleared first, so that a failure in closing leaves nothing to write to.
        writer, self._writer = self._writer, None
        if writer is not None:
            with self._one_warning():
                writer.close()

    @contextlib.contextmanager
    def _one_warning(self) -> Iterator[None]:
        """Turns the first error of the disk into a warning, after which nothing is written."""
        try:
            yield
        except OSError as error:
            self._writer = None
            log.warning("%s: no more events for TensorBoard (%s)", self.folder, error.strerror or error)
