# SPDX-License-Identifier: Apache-2.0
"""A segmenter that reads the masks off the image: what a data set's own scores make of known masks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from digseg_jax.prediction.answer import Answer
from digseg_jax.prediction.request import Request
from digseg_jax.segmentation.binary import BinaryCodec
from digseg_jax.segmentation.codec import Codec
from digseg_jax.segmentation.views import Views


def answer(masks: np.ndarray, bias: Any = None) -> Answer:
    """An answer of these probabilities [q, h, w]."""
    views = Views(np.zeros((1, 1, 1, 3), np.uint8), lambda planes: np.asarray(planes[0], np.float32))
    view = SimpleNamespace(
        slot=np.arange(len(masks)), probability=masks, alone=None, evidence=None, cells=None
    )
    shift = np.zeros(len(masks), np.float32) if bias is None else np.asarray(bias, np.float32)
    return Answer(views, (view,), masks.shape[1:], 2.0, shift)


class Reader:
    """Stands where a segmenter does; `read(image, query, coarse)` -> probabilities [h, w]."""

    def __init__(self, read: Any, presence: Any = None, codec: Codec | None = None):
        self.read, self.presence = read, presence
        self.task = SimpleNamespace(codec=codec or BinaryCodec())
        self.programs = SimpleNamespace(part=0, parts=1)
        self.views_of_call, self.size, self.short_side = 1, (8, 8), 0
        self.scale, self.seconds = 2.0, 0.0
        self.asked = 0  # images

    def asks_in(self, own: str = "{}", wanted: Any = ()) -> tuple[str, ...]:
        """The templates that are wanted, else none: `read` knows the names."""
        return tuple(wanted)

    def segment(self, requests: list[Request], estep: Any, **options: Any) -> list[Answer]:
        self.seconds += len(requests)
        self.asked += len(requests)
        if options.get("decoder") == "probe":
            return [SimpleNamespace(cell_probabilities=lambda r=r: self._cells(r)) for r in requests]
        return [answer(np.stack([self.read(r.image, q) for q in r.queries]), r.bias) for r in requests]

    def _cells(self, request: Request) -> Any:
        """What a coarse pass finds: the given masks, or those of a function of the image."""
        return self.presence(request.image) if callable(self.presence) else self.presence
