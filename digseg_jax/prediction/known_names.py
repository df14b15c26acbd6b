# SPDX-License-Identifier: Apache-2.0
"""Tells which queries lie far from every name that the weights were trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from digseg_jax.arraytypes import Float
from digseg_jax.prediction.pretrained import PretrainedSegmenter
from digseg_jax.training.tasks.parts import encode_bank

# Cosine of mean token features: of MiniLM, synonyms of trained names have 0.56 ("ocean", "water") to
# 0.86 ("automobile", "car"); unrelated words mostly less.
FAR = 0.54
NEAREST = 3  # names listed for a query
MOST = 5  # queries listed with their nearest names; the rest are only counted


class Far(NamedTuple):
    """A query that is close to no trained name, and the names that are closest."""

    query: str
    nearest: tuple[str, ...]


def far_queries(segmenter: PretrainedSegmenter, queries: Sequence[str]) -> list[Far]:
    """Finds the queries whose text features are far from those of every word of the training.

    A closed codec knows all of its queries.
    """
    description = segmenter.description
    names = list(dict.fromkeys([*description.classes, *description.synonyms]))
    if segmenter.codec.closed or not names:
        return []

    similar = _features(segmenter, queries) @ _features(segmenter, names).T
    ranked = np.argsort(-similar, axis=1)[:, :NEAREST]
    return [
        Far(query, tuple(names[i] for i in order))
        for query, row, order in zip(queries, similar, ranked, strict=True)
        if row.max() < FAR
    ]


def far_line(far: Sequence[Far]) -> str:
    """One line about the queries that are far from the training, the first few by name."""
    listed = "; ".join(f"{f.query!r} (nearest: {', '.join(f.nearest)})" for f in far[:MOST])
    if len(far) > MOST:
        listed += f"; and {len(far) - MOST} more of the queries"
    return f"far from every name that these weights were trained on, so masks may mean little: {listed}"


def _features(segmenter: PretrainedSegmenter, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
    """Mean of each text's token features, of length 1."""
    parts, model = segmenter.task.parts, segmenter.task.config.model
    assert parts.tower is not None  # only parts that are mere shapes have none
    bank = encode_bank(parts.tower, texts, model)

    # The sentence token, where there is one, is the mean already: it changes nothing but its weight.
    mask = np.asarray(bank.mask, np.float32)[..., None]
    mean = (np.asarray(bank.tokens, np.float32) * mask).sum(axis=1) / mask.sum(axis=1)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)
