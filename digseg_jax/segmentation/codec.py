# SPDX-License-Identifier: Apache-2.0
"""What a codec is: how queries become mask images for the U-Net to denoise, and how those are read.

The methods that a codec has no use for have bodies here; a new codec is a subclass in a module of its
own and a row of `codecs.CODECS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import numpy as np

from digseg_jax.arraytypes import Array, Bool, Float, Int
from digseg_jax.config.schema import DataConfig
from digseg_jax.segmentation.latent_probe import LatentProbe

QUERY_LIMIT = 16  # queries of a call; with an 8x2 ensemble 128 masks a view
QUERY_BUCKETS = (1, 2, 4, 6, 8, 12, 16)

ImageMap = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class HostAutoencoder:
    """The frozen autoencoder on host arrays, for what is computed once.

    encode: images float [n, h, w, 3] in [-1, 1] to scaled latents [n, h2, w2, c]. decode: back.
    factor: pixels along a side of a latent cell.
    """

    encode: ImageMap
    decode: ImageMap
    factor: int

    def round_trip(self, image: Float[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n h w 3"]:
        """What the autoencoder makes of images."""
        return self.decode(self.encode(image))


@runtime_checkable
class Codec(Protocol):
    """The way between the queries about an image and mask images.

    In shapes: b images, q queries of each, k mask images that answer them, t texts that the U-Net reads
    for them, s scores that a mask image is read as; k * s = q in prediction.

    Attributes:
        name: value of `config.segmentation.codec`, and the stem of the file of `state`.
        closed: answers the classes of one data set, all of them and in their order; else any texts.
        one_by_one: every query has a mask image and a text of its own (k = t = q), so that single ones
            can be cached, chosen and decoded.
        exclusive: a pixel belongs to one query (softmax over them) rather than to any number.
        scale: turns evidence into logits; None: it is fitted to a split.
    """

    name: ClassVar[str]
    closed: ClassVar[bool] = False
    one_by_one: ClassVar[bool] = False
    exclusive: ClassVar[bool] = False

    @property
    def scale(self) -> float | None:
        return None

    @classmethod
    def for_data(cls, data: DataConfig) -> Self:
        """The codec for what `data` trains on and evaluates.

        Raises:
          UserError: it cannot carry that.
        """

    def cell_probe(self) -> LatentProbe:
        """The linear reading of a latent cell, which codecs that are `one_by_one` have."""
        raise TypeError(f"the codec {self.name} reads its queries together")

    def num_images(self, queries: int) -> int:
        """Mask images for `queries` queries about an image: k for q."""

    def texts(self, queries: Sequence[str]) -> tuple[str, ...]:
        """The texts that the text tower reads for the queries about an image."""

    def text_rows(self, query: Int[Array, "b q"]) -> Int[Array, "b t"]:
        """The same for queries that are rows of a bank, whose texts are `texts` of all prompts."""

    def slots(self, count: int) -> int:
        """Queries of one call of the compiled programs, where `count` are asked about an image.

        By default such that they take the fewest calls and little padding.
        """
        if count <= QUERY_LIMIT:
            return next(b for b in QUERY_BUCKETS if b >= count)
        calls = -(-count // QUERY_LIMIT)
        return -(-count // calls)

    def check_queries(self, queries: Sequence[str]) -> None:
        """Raises UserError for queries that the codec cannot answer together."""
        return  # by default it answers any

    def draw(self, keys: Array) -> Any:
        """What training draws anew for each of b examples, of one key each; None: nothing.

        The result goes to `encode`, `context` and `mask_loss`. Prediction draws nothing (None there).
        """
        return None

    def encode(
        self,
        label: Int[Array, "b h w"],
        query_class: Int[Array, "b q"] | Int[Array, "b q m"],
        drawn: Any = None,
    ) -> Float[Array, "b k h w 3"]:
        """The mask images of label maps with ignore = -1, in [-1, 1].

        query_class: the class of each query, or the m ids that it covers (nested classes).
        """

    def context(
        self, tokens: Float[Array, "b t l d"], mask: Bool[Array, "b t l"], drawn: Any = None
    ) -> tuple[Float[Array, "b k l2 d"], Bool[Array, "b k l2"]]:
        """What cross-attention sees for each mask image, of the encoded texts; by default its text."""
        return tokens, mask

    def decode(self, image: Float[Array, "n h w 3"]) -> Float[Array, "n s h w"]:
        """Mask images to the evidence of each query that they show; positive or largest where seen."""

    def read_latents(self, latents: Float[Array, "n k e h w c"]) -> Float[Array, "n q e h w"]:
        """The same evidence for each latent cell, without the decoder."""

    def anchors(self, size: int) -> Float[Array, "a s s 3"] | None:
        """Images of `size` pixels a side, by whose latents the mask loss measures; None: by none."""
        return None

    def mask_loss(
        self,
        latent: Float[Array, "n h w c"],
        label: Int[Array, "b H W"],
        query_class: Int[Array, "b q"] | Int[Array, "b q m"],
        valid: Bool[Array, "n h w"],
        anchors: Float[Array, "a h w c"] | None,
        drawn: Any = None,
    ) -> Float[Array, " n"]:
        """The auxiliary loss of each of n = b * k predicted latents, over its valid cells.

        anchors: latents of `anchors(H)`.
        """

    def prepare(self, autoencoder: HostAutoencoder) -> None:
        """Computes what programs hold as constants, unless it is known; before any is traced."""

    def assume(self, latent_channels: int) -> None:
        """In place of `prepare`: constants of the right shapes, for programs that are never run."""

    def state(self) -> dict[str, Any]:
        """What must be kept beside trained weights, JSON-ready; empty: nothing."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what `state` gave; `prepare` comes after it.

        Raises:
          UserError: it is of another class list.
        """
        return  # by default there is none


def latent_validity(label: Int[Array, "b h w"], factor: int) -> Bool[Array, "b h2 w2"]:
    """True for latent cells none of whose factor x factor pixels carries the ignore label, -1."""
    b, h, w = label.shape
    cells = label.reshape(b, h // factor, factor, w // factor, factor)
    return (cells >= 0).all(axis=(2, 4))


def require_prepared(value: Any, name: str) -> Any:
    """A constant of a codec, which a traced program must not be the first to need."""
    if value is None:
        raise RuntimeError(f"{name} is not known yet: call prepare()")
    return value
