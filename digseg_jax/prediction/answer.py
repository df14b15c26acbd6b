# SPDX-License-Identifier: Apache-2.0
"""The soft masks of one image, kept view by view and made at its resolution when they are asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from digseg_jax.arraytypes import Float, Int
from digseg_jax.segmentation.resize import resize_probability
from digseg_jax.segmentation.views import Views


@dataclasses.dataclass
class ViewMasks:
    """The answer of one view.

    slot: int [q], the place of each query in the decoded arrays; -1: read from `cells`. probability,
    alone: float32 [d, h, w]; evidence: float32 [d, e, h, w], where it was asked for. cells: evidence of
    the latent cells, float32 [q, e, h2, w2], as the probe reads them. latents: float32
    [g, k, e, h2, w2, c] of g groups of queries, of a view that is read later.
    """

    slot: np.ndarray
    probability: np.ndarray | None = None
    alone: np.ndarray | None = None
    evidence: np.ndarray | None = None
    cells: np.ndarray | None = None
    latents: np.ndarray | None = None


class Planes:
    """Base class of one image's soft masks, which are made one at a time when they are asked for."""

    @property
    def num_queries(self) -> int:
        """How many queries were asked."""
        raise NotImplementedError

    def probability(self, query: int) -> Float[np.ndarray, "h w"]:
        """How probable each pixel is for a query, its bias included; float32 in [0, 1]."""
        raise NotImplementedError

    def stack(self) -> Float[np.ndarray, "q h w"]:
        """All probabilities at once: much memory where image and vocabulary are large."""
        first = self.probability(0)
        planes = np.empty((self.num_queries, *first.shape), np.float32)
        planes[0] = first
        for query in range(1, self.num_queries):
            planes[query] = self.probability(query)
        return planes

    def label_map(self) -> np.ndarray:
        """The most probable query of every pixel, int32 [h, w]."""
        winner = MostProbable()
        for query in range(self.num_queries):
            winner.see(self.probability(query))
        return winner.label


@dataclasses.dataclass(frozen=True)
class Answer(Planes):
    """The soft masks of one image, kept view by view.

    views: how its views become the image. masks: what each of them answers. size: of a view, height and
    width. scale, bias: turn the evidence that the probe reads into logits, text by text. ways: texts
    that ask for one query, one after the other; their probabilities are averaged.
    """

    views: Views
    masks: tuple[ViewMasks, ...]
    size: tuple[int, int]
    scale: float
    bias: Float[np.ndarray, " t"]
    ways: int = 1

    @property
    def num_queries(self) -> int:
        return len(self.bias) // self.ways

    @property
    def biased(self) -> bool:
        """Whether `alone` differs from `probability`."""
        return bool(self.bias.any())

    def probability(self, query: int) -> Float[np.ndarray, "h w"]:
        """How probable each pixel is for a query, its bias included; float32 in [0, 1]."""
        return self.views.assemble([self._mean(m, query, biased=True) for m in self.masks])

    def alone(self, query: int) -> Float[np.ndarray, "h w"]:
        """The same without the bias, which matters between queries only."""
        return self.views.assemble([self._mean(m, query, biased=False) for m in self.masks])

    def evidence(self, query: int) -> Float[np.ndarray, "e h w"]:
        """What each member saw, in [-1, 1]; only where `segment` was asked to keep it.

        A query of several texts has the members of each.
        """
        members = [
            np.concatenate([self._evidence(m, text) for text in self._texts(query)]) for m in self.masks
        ]
        return np.stack([self.views.assemble(list(planes)) for planes in zip(*members, strict=True)])

    def cell_probabilities(self) -> Float[np.ndarray, "q h2 w2"]:
        """Probabilities of the latent cells of an image that is one view, as the probe reads them."""
        (masks,) = self.masks
        if masks.cells is None:  # of a codec that reads its queries together
            assert masks.probability is not None  # what is not read from cells was decoded
            return masks.probability
        texts = (1.0 / (1.0 + np.exp(-self.scale * masks.cells))).mean(axis=1)
        return texts.reshape(-1, self.ways, *texts.shape[1:]).mean(axis=1)

    def _texts(self, query: int) -> range:
        """The places of the texts that ask for a query."""
        return range(query * self.ways, (query + 1) * self.ways)

    def _mean(self, masks: ViewMasks, query: int, *, biased: bool) -> np.ndarray:
        """The plane of a query: the mean of its texts'."""
        planes = [self._plane(masks, text, biased=biased) for text in self._texts(query)]
        return planes[0] if self.ways == 1 else np.stack(planes).mean(axis=0)

    def _plane(self, masks: ViewMasks, text: int, *, biased: bool) -> np.ndarray:
        if masks.slot[text] >= 0:
            decoded = masks.probability if biased or masks.alone is None else masks.alone
            assert decoded is not None  # of a text with a slot
            return decoded[masks.slot[text]]
        logits = self.scale * self._evidence(masks, text) + (self.bias[text] if biased else 0.0)
        return (1.0 / (1.0 + np.exp(-logits))).mean(axis=0)

    def _evidence(self, masks: ViewMasks, text: int) -> np.ndarray:
        if masks.slot[text] >= 0:
            assert masks.evidence is not None  # `segment` was asked to keep it
            return masks.evidence[masks.slot[text]]
        assert masks.cells is not None  # of every text without a slot
        return resize_probability(masks.cells[text], *self.size)


class GroupedAnswer(Planes):
    """Soft masks that would be too many to keep: a group of queries is asked for when it is needed.

    ask: computes the answer to the queries from one place on, `size` of them or the rest. Its masks are
    dropped when another group is asked for, so planes are best taken in order.
    """

    def __init__(self, ask: Callable[[int], Answer], num_queries: int, size: int):
        self.ask, self.size = ask, size
        self._num_queries = num_queries
        self._held: tuple[int, Answer] | None = None

    @property
    def num_queries(self) -> int:
        return self._num_queries

    def probability(self, query: int) -> Float[np.ndarray, "h w"]:
        first = query // self.size * self.size
        if self._held is None or self._held[0] != first:
            self._held = None  # two groups are never held
            self._held = (first, self.ask(first))
        return self._held[1].probability(query - first)


class MostProbable:
    """The most probable query of every pixel, from masks that come one after the other.

    floor: what a mask must exceed to count; pixels where none does are -1. None: there is no floor. Of
    equal masks the first wins.
    """

    def __init__(self, floor: float | None = None):
        self.floor, self.count = floor, 0
        self._label: Int[np.ndarray, "h w"] | None = None
        self._best: np.ndarray | None = None

    @property
    def label(self) -> Int[np.ndarray, "h w"]:
        """The numbers of the winners, int32; after the first mask was seen."""
        assert self._label is not None
        return self._label

    def see(self, mask: Float[np.ndarray, "h w"]) -> None:
        """Takes the mask of the next query."""
        if self._label is None or self._best is None:
            least = -np.inf if self.floor is None else self.floor
            self._best = np.full(mask.shape, least, mask.dtype)
            self._label = np.full(mask.shape, -1, np.int32)
        wins = mask > self._best
        self._label[wins] = self.count
        self._best[wins] = mask[wins]
        self.count += 1
