# SPDX-License-Identifier: Apache-2.0
"""The result of segmenting one image, for users: soft masks, label map, overlay and files."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from digseg_jax.arraytypes import Float, Int, UInt8
from digseg_jax.errors import UserError, nearest
from digseg_jax.io.files import expanded_target
from digseg_jax.prediction.answer import GroupedAnswer, MostProbable, Planes
from digseg_jax.prediction.files import SHOWN, overlay, write_prediction
from digseg_jax.prediction.targets import PredictionFiles


class Masks:
    """The soft masks of an image, one for each query.

    They are kept view by view, and brought to the image's size when they are asked for: `plane`,
    `label`, `overlay` and `save` need the memory of a few planes [H, W], `probability` of all. If
    even the views' masks would take too much memory, the network runs when they are asked for, on one
    group of queries at a time.

    Attributes:
        image: uint8 [H, W, 3], as it was segmented.
        queries: the texts that were asked, in order.
        facts: sampling, seed and templates, for the JSON file that `save` writes.
        colors: uint8 [queries, 3], RGB of each query in `overlay` and `save`; may be replaced.

    Example:
        >>> masks = dj.load_segmenter()(image, ["water", "forest"], ensemble=1, steps=1)
        >>> masks.probability.shape == (2, *image.shape[:2])
        True
        >>> sorted(path.name for path in masks.save("out"))[:2]
        ['mask.coco.json', 'mask.json']
    """

    def __init__(
        self,
        image: UInt8[np.ndarray, "h w 3"],
        queries: tuple[str, ...],
        answer: Planes,
        facts: dict[str, Any],
        colors: UInt8[np.ndarray, "q 3"],
    ):
        self.image, self.queries, self.facts = image, queries, facts
        self._answer, self.colors = answer, colors

    def __len__(self) -> int:
        """Number of queries."""
        return len(self.queries)

    def __iter__(self) -> Iterator[Float[np.ndarray, "h w"]]:
        """Yields the plane of each query, made one at a time."""
        return (self._answer.probability(query) for query in range(len(self)))

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        return f"Masks({height} x {width}, queries={list(self.queries)})"

    def plane(self, query: str | int) -> Float[np.ndarray, "h w"]:
        """Probability of a query at each pixel, float32 in [0, 1].

        query: its text, or its index in `queries`.

        Raises:
          UserError: a text that was not asked.
        """
        if isinstance(query, str) and query not in self.queries:
            hint = nearest(query, self.queries)
            raise UserError(f"{query!r} was not asked{hint}; asked: {', '.join(self.queries)}")
        return self._answer.probability(self.queries.index(query) if isinstance(query, str) else query)

    @functools.cached_property
    def probability(self) -> Float[np.ndarray, "q h w"]:
        """Probability of every query at each pixel, float32 in [0, 1]; computed at the first use."""
        return self._answer.stack()

    @functools.cached_property
    def label(self) -> Int[np.ndarray, "h w"]:
        """Index of the most probable query at each pixel, int32; ties go to the earlier query."""
        return self._answer.label_map()

    def overlay(self) -> UInt8[np.ndarray, "h2 w 3"]:
        """The image tinted with the queries' colors, and a legend below it.

        Pixels that no query claims with more than 0.5 keep their color.
        """
        # float16, as the files store it: the overlay then agrees with the files' masks.
        winner = MostProbable(SHOWN)
        for plane in self:
            winner.see(plane.astype(np.float16))
        return overlay(self.image, self.queries, winner.label, self.colors)

    def save(self, folder: str | os.PathLike, name: str = "mask") -> list[Path]:
        """Writes the files of a prediction, FOLDER/NAME and their endings; returns their paths.

        --mode=predict writes the same files: see `write_prediction`.

        Raises:
          UserError: the folder cannot be written.
        """
        folder = expanded_target(folder, "folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be made ({error.strerror})") from error
        files = PredictionFiles.of(folder / name, self.queries)
        self.write(files)
        return list(files)

    def write(
        self, files: PredictionFiles, advance: Callable[[int, int], None] | None = None
    ) -> dict[str, Any]:
        """Writes the files of a prediction under the given names; returns the content of NAME.json.

        advance: called after each mask with the number written and the total. It is not called if the
        network runs between the masks, whose progress was asked for with them.
        """
        told = None if isinstance(self._answer, GroupedAnswer) else advance
        return write_prediction(files, self.image, self.queries, self, self.facts, self.colors, told)
