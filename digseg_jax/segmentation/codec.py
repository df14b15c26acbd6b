# SPDX-License-Identifier: Apache-2.0
"""The interface of a codec: turns queries into mask images for the U-Net, and mask images into scores.

Optional methods have default bodies here. A new codec is a subclass in a module of its own and a row of
`codecs.CODECS`.
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
    """The frozen autoencoder as functions of host arrays, for constants that are computed once.

    encode: images float [n, h, w, 3] in [-1, 1] to scaled latents [n, h2, w2, c].
    decode: scaled latents to images.
    factor: side of a latent cell in pixels.
    """

    encode: ImageMap
    decode: ImageMap
    factor: int

    def round_trip(self, image: Float[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n h w 3"]:
        """Encodes images and decodes them again."""
        return self.decode(self.encode(image))


@runtime_checkable
class Codec(Protocol):
    """Interface of a codec: paints the answers to queries as mask images, and reads them back.

    Letters in shapes: b images; for each image q queries, k mask images that answer them and t texts
    that the U-Net reads; s scores are read from one mask image. In prediction k * s = q.

    Attributes:
        name: value of `config.model.codec`, and the stem of the file of `state`.
        closed: queries are the classes of one data set, all of them and in their order. Otherwise they
            are any texts.
        one_by_one: every query has a mask image and a text of its own (k = t = q), so that single ones
            can be cached, chosen and decoded.
        exclusive: a pixel belongs to one query (softmax over them) rather than to any number.
        background: a pixel may also belong to none of the queries; evidence is then measured against
            that, which has the evidence 0. For codecs that are `exclusive`.
        redrawn: mask images of an example differ from one draw to the next, so they cannot be cached.
        recolored: every member of an ensemble paints in colors of its own, so that latents of several
            members cannot be averaged before they are read.
        pooled: a text enters as one token, its sentence feature, rather than word by word.
        scale: factor from evidence to logits; None if it is fitted to a split instead.
    """

    name: ClassVar[str]
    closed: ClassVar[bool] = False
    one_by_one: ClassVar[bool] = False
    exclusive: ClassVar[bool] = False
    background: ClassVar[bool] = False
    redrawn: ClassVar[bool] = False
    recolored: ClassVar[bool] = False
    pooled: ClassVar[bool] = False

    @property
    def scale(self) -> float | None:
        return None

    @classmethod
    def for_data(cls, data: DataConfig, classes: int | None = None) -> Self:
        """Makes the codec for the data sets that `data` trains on and evaluates.

        classes: number of the data set's classes where it is known already, as of trained weights,
          whose data set may not be at hand.

        Raises:
          UserError: the codec cannot represent them.
        """

    @classmethod
    def mark_width(cls, latent_channels: int) -> int:
        """Features that `context` appends to every token; 0 by default."""
        return 0

    def marks(self) -> Float[np.ndarray, "k m"] | None:
        """Those features of the token in each place of a prediction; None if tokens are not marked."""
        return None

    def cell_probe(self) -> LatentProbe:
        """The linear reading of a latent cell, which codecs that are `one_by_one` have."""
        raise TypeError(f"the codec {self.name} reads its queries together")

    def num_images(self, queries: int) -> int:
        """Number of mask images that answer `queries` queries about an image: k for q."""

    def texts(self, queries: Sequence[str]) -> tuple[str, ...]:
        """Texts that the text encoder reads for the queries about an image."""

    def text_rows(self, query: Int[Array, "b q"]) -> Int[Array, "b t"]:
        """Rows of the bank of `texts(prompts)` to read for queries that are rows of the prompts."""

    def slots(self, count: int) -> int:
        """Number of queries per call of the compiled programs, if `count` are asked about an image.

        By default the number with the fewest calls and little padding.
        """
        if count <= QUERY_LIMIT:
            return next(b for b in QUERY_BUCKETS if b >= count)
        calls = -(-count // QUERY_LIMIT)
        return -(-count // calls)

    def asks_for_all(self, classes: int, limit: int) -> bool:
        """Whether a vocabulary is asked for whole, rather than the classes that a coarse pass finds.

        limit: `eval.exhaustive_limit`.
        """
        return self.closed or classes <= limit

    def gate_limit(self, limit: int) -> int:
        """The most classes of an image that are asked for after a coarse pass; limit: of `eval`."""
        return limit

    def check_queries(self, queries: Sequence[str]) -> None:
        """Raises UserError for queries that the codec cannot answer together."""
        return  # by default it answers any

    def hide_empty(self, mask: Bool[np.ndarray, "t l"], asked: int) -> Bool[np.ndarray, "t l"]:
        """Hides the texts of a call's empty places, which repeat the last of the `asked` queries.

        By default none are hidden: where each query has an image of its own, they do no harm.
        """
        return mask

    def draw(self, keys: Array, query_class: Int[Array, "b q"] | Int[Array, "b q m"]) -> Any:
        """Random choices for each of b training examples, from one key each; None if there are none.

        They are passed to `encode`, `context` and `mask_loss`. Prediction passes None.
        """
        return None

    def encode(
        self,
        label: Int[Array, "b h w"],
        query_class: Int[Array, "b q"] | Int[Array, "b q m"],
        drawn: Any = None,
    ) -> Float[Array, "b k h w 3"]:
        """Paints the mask images of label maps with ignore = -1, in [-1, 1].

        query_class: the class of each query, or the m ids that it covers (nested classes).
        """

    def context(
        self, tokens: Float[Array, "b t l d"], mask: Bool[Array, "b t l"], drawn: Any = None
    ) -> tuple[Float[Array, "b k l2 d2"], Bool[Array, "b k l2"]]:
        """Gives the tokens that the U-Net reads for each mask image; by default its own text's.

        Each is d features wide, and `mark_width` wider if the codec marks them.
        """
        return tokens, mask

    def member_context(
        self, tokens: Float[Array, "b t l d"], mask: Bool[Array, "b t l"], member: int | Array
    ) -> tuple[Float[Array, "b k l2 d2"], Bool[Array, "b k l2"]]:
        """`context` for one member of an ensemble in prediction; by default the same for all."""
        return self.context(tokens, mask)

    def in_places(
        self, evidence: Float[Array, "n q e h w"], first: int | Array
    ) -> Float[Array, "n q e h w"]:
        """Brings evidence, as `decode` and `read_latents` order it, into the order of the queries.

        first: number of the first of the e members.
        """
        return evidence

    def decode(self, image: Float[Array, "n h w 3"]) -> Float[Array, "n s h w"]:
        """Reads each query's evidence from mask images: positive, or largest, where it is seen."""

    def read_latents(self, latents: Float[Array, "n k e h w c"]) -> Float[Array, "n q e h w"]:
        """Reads the same evidence for each latent cell, without the decoder."""

    def anchors(self, size: int) -> Float[Array, "a s s 3"] | None:
        """Images of side `size` whose latents the mask loss compares with; None if it needs none."""
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
        """Computes the auxiliary loss of each of n = b * k predicted latents, over its valid cells.

        anchors: latents of `anchors(H)`.
        """

    def prepare(self, autoencoder: HostAutoencoder) -> None:
        """Computes the constants of the programs, unless they are known; call it before any tracing."""

    def assume(self, latent_channels: int) -> None:
        """Sets constants of the right shapes instead of `prepare`, for programs that are never run."""

    def state(self) -> dict[str, Any]:
        """Constants that must be stored with trained weights, JSON-ready; empty if there are none."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Restores the constants that `state` returned; call it before `prepare`.

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
    """Returns a codec's constant; raises RuntimeError if `prepare` has not computed it yet."""
    if value is None:
        raise RuntimeError(f"{name} is not known yet: call prepare()")
    return value
