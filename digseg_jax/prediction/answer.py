# SPDX-License-Identifier: Apache-2.0
"""Soft masks of one image: kept view by view, brought to the image's resolution one query at a time.

A query may be asked in several texts, one for each template; "text" below is one of them. Evidence is
the score that a mask image gives a pixel, in [-1, 1]; probability = sigmoid(scale * evidence + bias).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np

from digseg_jax.arraytypes import Float, Int
from digseg_jax.segmentation.resize import resize_probability
from digseg_jax.segmentation.views import Views


@dataclasses.dataclass
class ViewMasks:
    """Masks of one view, for q texts of which d were decoded; an array that nobody asked for is None.

    Attributes:
      slot: int [q], the place of each text in the decoded arrays; -1: read from `cells`.
      probability, alone: float32 [d, h, w] in [0, 1], with and without the class bias.
      evidence: float32 [d, e, h, w] in [-1, 1], one plane for each of e ensemble members.
      cells: evidence of the latent cells, float32 [q, e, h2, w2], as the linear probe reads it.
      latents: float32 [g, k, e, h2, w2, c], g groups of k mask images, of a view that is read later.
    """

    slot: np.ndarray
    probability: np.ndarray | None = None
    alone: np.ndarray | None = None
    evidence: np.ndarray | None = None
    cells: np.ndarray | None = None
    latents: np.ndarray | None = None

    @classmethod
    def joined(cls, parts: Sequence[dict[str, np.ndarray]], count: int) -> Self:
        """Masks of a view whose `count` texts were all decoded; parts: its groups, padding included."""
        arrays = {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}
        return cls(np.arange(count), **arrays)


class Planes:
    """Base class of one image's soft masks, each of which is computed when it is asked for."""

    @property
    def num_queries(self) -> int:
        """Number of queries."""
        raise NotImplementedError

    def probability(self, query: int) -> Float[np.ndarray, "h w"]:
        """Probability of a query at each pixel, its bias included; float32 in [0, 1]."""
        raise NotImplementedError

    def stack(self) -> Float[np.ndarray, "q h w"]:
        """All probabilities at once, 4 * q * h * w bytes: large for a large image and vocabulary."""
        # The first plane has the size; filling one array avoids a second copy of all planes.
        first = self.probability(0)
        planes = np.empty((self.num_queries, *first.shape), np.float32)
        planes[0] = first

        for query in range(1, self.num_queries):
            planes[query] = self.probability(query)
        return planes

    def label_map(self) -> np.ndarray:
        """The most probable query of every pixel, int32 [h, w]."""
        # A running maximum: one plane at a time instead of the whole stack.
        winner = MostProbable()
        for query in range(self.num_queries):
            winner.see(self.probability(query))
        return winner.label


@dataclasses.dataclass(frozen=True)
class Answer(Planes):
    """Soft masks of one image, kept view by view.

    Attributes:
      views: the cut of the image into views, and its inverse.
      masks: the masks of each view, in the order of the views.
      size: height and width of a view, pixels.
      scale, bias: logits = scale * evidence + bias, one bias for each text.
      ways: texts per query, stored next to each other; their probabilities are averaged.
    """

    views: Views
    masks: tuple[ViewMasks, ...]
    size: tuple[int, int]
    scale: float
    bias: Float[np.ndarray, " t"]
    ways: int = 1

    @property
    def num_queries(self) -> int:
        """Number of queries; there are `ways` texts for each."""
        return len(self.bias) // self.ways

    @property
    def biased(self) -> bool:
        """Whether `alone` differs from `probability`, that is, some bias is not zero."""
        return bool(self.bias.any())

    def probability(self, query: int) -> Float[np.ndarray, "h w"]:
        """Probability of a query at each pixel, its bias included; float32 in [0, 1]."""
        return self.views.assemble([self._mean(m, query, biased=True) for m in self.masks])

    def alone(self, query: int) -> Float[np.ndarray, "h w"]:
        """Probability without the bias, for a mask that is judged without the other queries.

        A bias only ranks queries against each other.
        """
        return self.views.assemble([self._mean(m, query, biased=False) for m in self.masks])

    def evidence(self, query: int) -> Float[np.ndarray, "e h w"]:
        """Evidence of each ensemble member, in [-1, 1]; only if `segment` was asked to keep it.

        A query asked in several texts has the members of each text.
        """
        # Assemble member by member: [view][member] becomes [member][view].
        members = [
            np.concatenate([self._evidence(m, text) for text in self._texts(query)]) for m in self.masks
        ]
        return np.stack([self.views.assemble(list(planes)) for planes in zip(*members, strict=True)])

    def cell_probabilities(self) -> Float[np.ndarray, "q h2 w2"]:
        """Probabilities at the latent cells of an image that is one view, read by the linear probe."""
        # A codec that reads its queries together has no probe: its masks were decoded instead.
        (masks,) = self.masks
        if masks.cells is None:
            assert masks.probability is not None
            return masks.probability

        # Average over the members, then over the texts of each query; biases are left out.
        texts = (1.0 / (1.0 + np.exp(-self.scale * masks.cells))).mean(axis=1)
        return texts.reshape(-1, self.ways, *texts.shape[1:]).mean(axis=1)

    def _texts(self, query: int) -> range:
        """Indices of the texts that ask for a query."""
        return range(query * self.ways, (query + 1) * self.ways)

    def _mean(self, masks: ViewMasks, query: int, *, biased: bool) -> np.ndarray:
        """Mean probability [h, w] over the texts of a query, in one view."""
        planes = [self._plane(masks, text, biased=biased) for text in self._texts(query)]
        return planes[0] if self.ways == 1 else np.stack(planes).mean(axis=0)

    def _plane(self, masks: ViewMasks, text: int, *, biased: bool) -> np.ndarray:
        """Probability [h, w] of one text in one view."""
        # A decoded mask. `alone` is only kept where it differs from `probability`.
        if masks.slot[text] >= 0:
            decoded = masks.probability if biased or masks.alone is None else masks.alone
            assert decoded is not None  # a text with a slot was decoded
            return decoded[masks.slot[text]]

        # The probe's reading: a sigmoid for each member, then their mean.
        logits = self.scale * self._evidence(masks, text) + (self.bias[text] if biased else 0.0)
        return (1.0 / (1.0 + np.exp(-logits))).mean(axis=0)

    def _evidence(self, masks: ViewMasks, text: int) -> np.ndarray:
        """Evidence [e, h, w] of one text in one view, cells enlarged to the view's size."""
        if masks.slot[text] >= 0:
            assert masks.evidence is not None  # `segment` was asked to keep it
            return masks.evidence[masks.slot[text]]

        assert masks.cells is not None  # every text without a slot is read from cells
        return resize_probability(masks.cells[text], *self.size)


def empty_answer(
    views: Views, size: tuple[int, int], scale: float, bias: Float[np.ndarray, " t"], ways: int
) -> Answer:
    """An answer with a decoded mask for each text of each view, 0 everywhere, that is to be filled."""
    count = len(bias)
    masks = (ViewMasks(np.arange(count), np.zeros((count, *size), np.float32)) for _ in views.crops)
    return Answer(views, tuple(masks), size, scale, bias, ways)


class GroupedAnswer(Planes):
    """Soft masks that would take too much memory together: computed one group of queries at a time.

    Only the latest group is held, so queries are best read in their order.

    Args:
      ask: computes the answer to a group, given the index of its first query.
      num_queries: queries of all groups together.
      size: queries of a group; the last one may have fewer.
    """

    def __init__(self, ask: Callable[[int], Answer], num_queries: int, size: int):
        self.ask, self.size = ask, size
        self._num_queries = num_queries
        self._held: tuple[int, Answer] | None = None

    @property
    def num_queries(self) -> int:
        """Number of queries, over all groups."""
        return self._num_queries

    def probability(self, query: int) -> Float[np.ndarray, "h w"]:
        """Probability of a query at each pixel; runs the network if its group is not the held one."""
        first = query // self.size * self.size
        if self._held is None or self._held[0] != first:
            # Free the old group first: two groups together would exceed the memory limit.
            self._held = None
            self._held = (first, self.ask(first))
        return self._held[1].probability(query - first)


class MostProbable:
    """Running maximum over masks: the most probable query of every pixel; ties go to the earlier one.

    floor: value that a mask must exceed to win a pixel; a pixel without a winner is -1. None: no floor.
    """

    def __init__(self, floor: float | None = None):
        self.floor, self.count = floor, 0
        self._label: Int[np.ndarray, "h w"] | None = None
        self._best: np.ndarray | None = None

    @property
    def label(self) -> Int[np.ndarray, "h w"]:
        """Index of each pixel's winner, int32; only after the first mask was seen."""
        assert self._label is not None
        return self._label

    def see(self, mask: Float[np.ndarray, "h w"]) -> None:
        """Takes the mask of the next query."""
        # Allocate at the first mask, which has the size and the type.
        if self._label is None or self._best is None:
            least = -np.inf if self.floor is None else self.floor
            self._best = np.full(mask.shape, least, mask.dtype)
            self._label = np.full(mask.shape, -1, np.int32)

        # Strictly greater, so that the first of equal masks keeps the pixel.
        wins = mask > self._best
        self._label[wins] = self.count
        self._best[wins] = mask[wins]
        self.count += 1
