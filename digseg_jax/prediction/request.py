# SPDX-License-Identifier: Apache-2.0
"""What is asked about an image, and how its biases fill the places of a call."""

from __future__ import annotations

import dataclasses

import numpy as np

from digseg_jax.arraytypes import Float, UInt8
from digseg_jax.config.templates import fill


@dataclasses.dataclass(frozen=True)
class Request:
    """An image and its queries.

    index: identifies the image in the draws of the noise. queries: texts, or the class names of a
    closed codec in their order. bias: added to each query's logits (see `segmentation.calibration`).
    templates: prompts for each query, whose probabilities are averaged, or their features if the codec
    pools a text to one; empty: the bare query. first_view: number of its first view, of a part of a
    larger image.
    """

    image: UInt8[np.ndarray, "h w 3"]
    index: int
    queries: tuple[str, ...]
    bias: tuple[float, ...] | None = None
    templates: tuple[str, ...] = ()
    first_view: int = 0

    def in_texts(self) -> Request:
        """The same request with one text per query and template, the texts of a query side by side."""
        if not self.templates:
            return self
        # A query's bias goes to each of its texts.
        texts = tuple(fill(t, query) for query in self.queries for t in self.templates)
        bias = None if self.bias is None else np.repeat(self.bias, len(self.templates)).tolist()
        return dataclasses.replace(
            self, queries=texts, bias=None if bias is None else tuple(bias), templates=()
        )

    @property
    def biases(self) -> Float[np.ndarray, " q"]:
        """Bias of each query, 0 by default."""
        if self.bias is None:
            return np.zeros(len(self.queries), np.float32)
        return np.asarray(self.bias, np.float32)


def filled(bias: Float[np.ndarray, " q"] | tuple[()], slots: int) -> Float[np.ndarray, " s"]:
    """Biases of a call's places; empty ones have -inf, so that they compete with no query."""
    row = np.full(slots, -np.inf, np.float32)
    row[: len(bias)] = bias
    return row
