# SPDX-License-Identifier: Apache-2.0
"""The demo's queue: one image at a time is segmented, and its masks can be seen meanwhile."""

from __future__ import annotations

import collections
import dataclasses
import functools
import secrets
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from digseg_jax.arraytypes import Float, UInt8
from digseg_jax.config.sampling import EStep
from digseg_jax.errors import UserError
from digseg_jax.log import log
from digseg_jax.prediction.files import SHOWN, query_colors
from digseg_jax.prediction.masks import Masks
from digseg_jax.prediction.progress import Moment
from digseg_jax.prediction.targets import PredictionFiles
from digseg_jax.viz.images import to_hex

WAITING = 8  # images in the queue; more are refused
KEPT = 4  # finished images whose masks are still there
MAX_VALUES = 100_000_000  # pixels times words of an image: 200 MB of masks
LOOKS = 0.25  # share of the time that may go into masks that are shown while it works

Segment = Callable[..., Masks]  # as `PretrainedSegmenter.__call__`


class Canceled(Exception):
    """The masks are no longer wanted."""


@dataclasses.dataclass(frozen=True)
class Order:
    """An image, at the size at which it is segmented, and what is asked about it.

    datasets: the weights' training data, whose classes have their official colors. name: of the image's
    file, for the files that are made of it; "": not known.
    """

    image: UInt8[np.ndarray, "h w 3"]
    words: tuple[str, ...]
    estep: EStep
    datasets: tuple[str, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        """Raises UserError for more masks than are kept in memory."""
        if self.image[..., 0].size * len(self.words) > MAX_VALUES:
            raise UserError(
                f"{len(self.words)} words are too many for an image of this size: use fewer, or a "
                "smaller size"
            )

    @functools.cached_property
    def colors(self) -> UInt8[np.ndarray, "q 3"]:
        """RGB of each word."""
        return query_colors(self.words, self.datasets)


class Job:
    """One order on its way; read by the server's threads while the worker writes.

    Attributes:
      state: queued, running, done, failed or canceled.
      planes: soft masks so far, float16 [q, h, w]; None before the first.
      version: counts the changes of `planes`.
      shares: of the image that each word's mask covers, 0..1.
    """

    def __init__(self, order: Order):
        self.order, self.id = order, secrets.token_urlsafe(9)
        self.state, self.error = "queued", ""
        self.moment: Moment | None = None
        self.planes: Float[np.ndarray, "q h w"] | None = None
        self.version, self.shares = 0, [0.0] * len(order.words)
        self.wanted = True  # False: the next step is the last one
        self.started = 0.0  # seconds, of the clock
        self.looking = 0.0  # seconds spent on masks that are only shown
        self.scratch = tempfile.TemporaryDirectory(prefix="digseg_jax_demo_")
        self.files = PredictionFiles.of(Path(self.scratch.name) / "masks", order.words)

    def facts(self, place: int) -> dict[str, Any]:
        """What the page shows; place: images before this one in the queue."""
        height, width = self.order.image.shape[:2]
        found: dict[str, Any] = {
            "id": self.id, "state": self.state, "place": place, "error": self.error,
            "version": self.version, "width": width, "height": height,
            "members": self.order.estep.ensemble, "steps": self.order.estep.steps,
        }  # fmt: skip
        if self.moment:
            names = ("done", "total", "member", "step")
            found |= {name: getattr(self.moment, name) for name in names}

        # Each word with its color, and the share of the image that it covers.
        rows = zip(self.order.words, self.order.colors, self.shares, strict=True)
        found["words"] = [{"word": w, "color": to_hex(c), "share": s} for w, c, s in rows]
        return found

    def show(self, planes: Float[np.ndarray, "q h w"]) -> None:
        """Puts new soft masks in place of the old ones."""
        # The shares are computed once: the page asks several times a second.
        planes = planes.astype(np.float16)
        self.shares = [float((plane > SHOWN).mean()) for plane in planes]
        self.planes = planes
        self.version += 1

    def see(self, moment: Moment) -> None:
        """Watches the segmentation: keeps its masks as often as a share of the time allows.

        Raises:
          Canceled: the masks are no longer wanted.
        """
        if not self.wanted:
            raise Canceled
        self.moment = moment
        start = time.monotonic()
        if self.looking > LOOKS * (start - self.started):
            return
        self.show(moment.masks().stack())
        self.looking += time.monotonic() - start


class Queue:
    """Orders in the order of their arrival, and the thread that segments them one by one.

    Args:
      segment: makes the masks.
      seed: of the members' noise.
    """

    def __init__(self, segment: Segment, seed: int):
        self._segment, self._seed = segment, seed
        self._changed = threading.Condition()
        self._waiting: collections.deque[Job] = collections.deque()
        self._jobs: dict[str, Job] = {}
        self._thread = threading.Thread(target=self._work, name="demo worker", daemon=True)
        self._thread.start()

    def put(self, order: Order) -> Job:
        """Appends an order.

        Raises:
          UserError: the queue is full.
        """
        with self._changed:
            if len(self._waiting) >= WAITING:
                raise UserError(f"{WAITING} images are waiting already; try again later")
            job = Job(order)
            self._waiting.append(job)
            self._jobs[job.id] = job
            self._forget()
            self._changed.notify()
        return job

    def get(self, job_id: str) -> Job | None:
        """The order with this identity; None if there is none, or no longer."""
        return self._jobs.get(job_id)

    def facts(self, job: Job) -> dict[str, Any]:
        """What the page shows of an order."""
        with self._changed:
            place = list(self._waiting).index(job) + 1 if job in self._waiting else 0
        return job.facts(place)

    def cancel(self, job: Job) -> None:
        """Takes an order out of the queue, or ends it after the step that is running."""
        with self._changed:
            job.wanted = False
            if job in self._waiting:
                self._waiting.remove(job)
                job.state = "canceled"

    def close(self) -> None:
        """Removes the files of all orders."""
        for job in list(self._jobs.values()):
            job.wanted = False
            job.scratch.cleanup()

    def _forget(self) -> None:
        """Drops the oldest finished orders."""
        over = [job for job in self._jobs.values() if job.state not in ("queued", "running")]
        for job in over[: max(0, len(over) - KEPT)]:
            del self._jobs[job.id]
            job.scratch.cleanup()

    def _work(self) -> None:
        """Segments one order after the other, for ever."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                job = self._waiting.popleft()
                job.state, job.started = "running", time.monotonic()
            state = self._make(job)
            with self._changed:
                job.state = state
                self._forget()

    def _make(self, job: Job) -> str:
        """Makes the masks of an order and their files; returns its new state."""
        order = job.order
        try:
            masks = self._segment(
                order.image, order.words, order.estep.ensemble, order.estep.steps, self._seed,
                spacing=order.estep.spacing, watch=job.see,
            )  # fmt: skip
            job.show(masks.probability)
            if order.name:
                masks.facts = {"image": order.name} | masks.facts
            masks.write(job.files)
        except Canceled:
            return "canceled"
        except UserError as error:
            job.error = str(error)
            return "failed"
        except Exception as error:  # one image must not end the demo
            log.exception("an image of the demo failed")
            job.error = f"failed: {' '.join(str(error).split())[:200] or type(error).__name__}"
            return "failed"
        return "done"
