# SPDX-License-Identifier: Apache-2.0
"""What the calls of one segmentation share: its settings, how far it is, and who watches it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from digseg_jax.arraytypes import Array, Float
from digseg_jax.config.sampling import EStep
from digseg_jax.prediction.answer import Answer

Read = Callable[[np.ndarray], np.ndarray]  # latents [n k e h w c] -> probabilities [n q h w]


@dataclasses.dataclass(frozen=True)
class Moment:
    """What a watcher receives after a step of a member.

    Attributes:
      done, total: steps, over the views, groups of queries and members of the image.
      member, step: of this step, from 1.
      masks: reads the masks as they are now: the mean of the members so far. Where no view has been
        sampled yet, they are 0. Only a watcher that asks pays for the reading.
    """

    done: int
    total: int
    member: int
    step: int
    masks: Callable[[], Answer]


Watch = Callable[[Moment], None]


class Watcher:
    """Keeps the masks of an image while they are sampled, and calls a watcher after every step.

    Args:
      watch: called with each `Moment`; what it raises ends the segmentation.
      answer: to be filled, with a place for every text of every view.
      total: steps of the whole image.
    """

    def __init__(self, watch: Watch, answer: Answer, total: int):
        self.watch, self.answer, self.total = watch, answer, total
        self.done = 0

    def sees(
        self, read: Read, views: Sequence[int], first: int
    ) -> Callable[[int, int, Float[np.ndarray, "n k e h w c"]], None]:
        """A callback for the steps of one call.

        read: reads the call's masks. views: those of the call. first: index of its first text.
        """

        def seen(member: int, step: int, latents: np.ndarray) -> None:
            """Tells of a step; latents: clean ones of the members so far."""

            def masks() -> Answer:
                self.put(read(latents), views, first)
                return self.answer

            self.done += 1
            self.watch(Moment(self.done, self.total, member, step, masks))

        return seen

    def put(self, probability: Float[np.ndarray, "n q h w"], views: Sequence[int], first: int) -> None:
        """Keeps the masks of one call; places without a text are left out."""
        for planes, view in zip(probability, views, strict=False):
            kept = self.answer.masks[view].probability
            assert kept is not None  # the answer was made with room for all
            part = kept[first : first + len(planes)]
            part[:] = planes[: len(part)]


@dataclasses.dataclass
class Job:
    """Settings and progress that the calls of one `segment` share.

    slots: texts per call. groups: calls that a view needs. decoded: the most texts of a request whose
    masks are all decoded, 0 without one. chooses: whether other requests decode only some masks.
    """

    estep: EStep
    root: Array
    scale: float
    decoder: str
    evidence: bool
    later: bool
    advance: Callable[[int, int], None] | None = None
    watcher: Watcher | None = None
    slots: int = 1
    groups: int = 1
    decoded: int = 0
    chooses: bool = False
    biased: bool = False
    done: int = 0
    total: int = 0

    def tick(self) -> None:
        """Counts one more step as done and reports it."""
        self.done += 1
        if self.advance:
            self.advance(self.done, self.total)
