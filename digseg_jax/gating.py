# SPDX-License-Identifier: Apache-2.0
"""Presence scorers, and images asked in three ways: oracle, gated, exhaustive.

A scorer is any callable (image uint8 [h, w, 3], index) -> scores [classes]: an image-text model, a
multi-label head, or the ones here, which take one coarse step of the segmenter itself.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from digseg_jax.arraytypes import Float, Int, UInt8
from digseg_jax.errors import UserError
from digseg_jax.predictor import Predictor
from digseg_jax.segmentation import open_vocab
from digseg_jax.segmentation.inference import EStep

Scorer = Callable[[UInt8[np.ndarray, "h w 3"], int], Float[np.ndarray, "q"]]


def coarse_scorer(
    predictor: Predictor, prompts: Sequence[str], *, decoder: str = "probe", key: int = 0
) -> Scorer:
    """One member, one step, on the whole picture squeezed to a square.

    decoder: "probe" reads the latents linearly and decodes nothing; "vae" decodes.

    Raises:
      UserError: the weights paint a palette, which has no single queries.
    """
    if predictor.task.codec != "binary":
        raise UserError("gating asks for single classes; it needs config.segmentation.codec='binary'")
    coarse = Predictor(
        predictor.task,
        predictor.params,
        scale=predictor.scale,
        decoder=decoder,
        mesh=predictor.mesh,
    )

    def score(image: np.ndarray, index: int) -> np.ndarray:
        small = coarse.squares([image])
        masks = coarse.predict_masks(
            small, prompts, ensemble=1, steps=1, mode="whole", key=key, first=index
        )
        return open_vocab.presence(masks[0])

    return score


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The classes of a data set and how they are asked for. bias: see `Predictor.predict_masks`."""

    prompts: tuple[str, ...]
    bias: tuple[float, ...] | None = None

    def subset(self, classes: Int[np.ndarray, "k"]) -> tuple[list[str], list[float] | None]:
        bias = None if self.bias is None else [self.bias[c] for c in classes]
        return [self.prompts[c] for c in classes], bias


@dataclasses.dataclass(frozen=True)
class Asker:
    """Label maps of an image under each protocol, with the seconds that it took.

    Compilation is not counted: a call that had to compile is timed by doing it again.
    """

    predictor: Predictor
    vocabulary: Vocabulary
    estep: EStep
    mode: str = "whole"
    key: int = 0
    _warm: set[int] = dataclasses.field(default_factory=set)

    def over(
        self, image: UInt8[np.ndarray, "h w 3"], index: int, classes: Int[np.ndarray, "k"]
    ) -> tuple[Int[np.ndarray, "h w"], float]:
        """The label map when only `classes` are asked for."""
        prompts, bias = self.vocabulary.subset(classes)
        options = {
            "ensemble": self.estep.ensemble,
            "steps": self.estep.steps,
            "spacing": self.estep.spacing,
            "key": self.key,
            "mode": self.mode,
            "first": index,
            "bias": bias,
        }
        while True:
            programs, start = self.predictor.programs, time.monotonic()
            masks = self.predictor.predict_masks([image], prompts, **options)[0]
            seconds = time.monotonic() - start
            if self.predictor.programs == programs:
                return open_vocab.label_map(masks, classes), seconds

    def exhaustive(self, image: np.ndarray, index: int) -> tuple[np.ndarray, float]:
        return self.over(image, index, np.arange(len(self.vocabulary.prompts)))

    def oracle(self, image: np.ndarray, index: int, label: np.ndarray) -> tuple[np.ndarray, float]:
        """Only what the truth contains: easier than any honest protocol, and labelled as such."""
        present = np.unique(label[label >= 0])
        return self.over(image, index, present if len(present) else np.arange(1))

    def gated(
        self, image: np.ndarray, index: int, scorer: Scorer, limit: int, cut: float
    ) -> tuple[np.ndarray, float, np.ndarray]:
        """Label map, seconds (scoring included) and the scores."""
        if id(scorer) not in self._warm:
            scorer(image, index)
            self._warm.add(id(scorer))
        start = time.monotonic()
        scores = scorer(image, index)
        scoring = time.monotonic() - start
        label, seconds = self.over(image, index, open_vocab.survivors(scores, limit, cut))
        return label, scoring + seconds, scores
