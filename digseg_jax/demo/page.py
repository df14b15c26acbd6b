# SPDX-License-Identifier: Apache-2.0
"""The demo's page: the report's style, slider and stage, and what this model can be asked."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from digseg_jax.data.datasets import registry
from digseg_jax.data.datasets.landcover import GROUPS
from digseg_jax.errors import UserError
from digseg_jax.prediction.pretrained import PretrainedSegmenter
from digseg_jax.report.cards import DataImage
from digseg_jax.viz.templates import render

FOLDER = Path(__file__).parent
# Images that the shipped weights were not trained on: squares of land cover (NASA Blue Marble, public
# domain), and nuclei of the Data Science Bowl 2018 (BBBC038, CC0), to which these words belong.
NUCLEI = {"cell_nuclei": ["nucleus"], "stained_tissue": ["nucleus"]}
SAMPLES = {path.stem: path for path in sorted((FOLDER / "samples").glob("*.jpg"))}
MAX_UPLOAD = 64 * 2**20  # bytes of an image
FIRST_WORDS = 6  # of the model's classes that the field shows at first
# A transparent pixel: the images come later.
_EMPTY = DataImage(
    "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7", 4, 3
)


class Page:
    """The page of a model.

    Args:
      name: of the model, as the user knows it.
      segmenter: knows its classes, and whether it takes any word.

    Attributes:
      spacing: of the timesteps, as the weights or the user's configuration have it.
    """

    def __init__(self, name: str, segmenter: PretrainedSegmenter):
        self.classes, self.closed = list(segmenter.description.classes), segmenter.codec.closed
        self.datasets = tuple(segmenter.description.datasets)
        sampling = segmenter.settings
        self.spacing = sampling.spacing
        self.html = render(
            "demo/demo.html.j2",
            model=name,
            samples=[(stem, stem.replace("_", " ").title()) for stem in SAMPLES],
            empty=_EMPTY,
            facts={
                "classes": self.classes,
                "words": self.classes if self.closed else self.classes[:FIRST_WORDS],
                "samples": {name: self._words_of(name) for name in SAMPLES},
                "closed": self.closed,
                "members": sampling.ensemble,
                "steps": sampling.steps,
                "most": MAX_UPLOAD,
                "vocabularies": {} if self.closed else _vocabularies(),
            },
        )

    def _words_of(self, sample: str) -> list[str]:
        """What a sample shows, as far as the model knows it; a closed one is always asked for all."""
        shown = NUCLEI.get(sample, GROUPS)
        return [] if self.closed else [name for name in shown if name in self.classes]

    def check(self, words: Sequence[str]) -> None:
        """Raises UserError unless the model can be asked these words."""
        if self.closed and list(words) != self.classes:
            raise UserError(f"this model answers its own classes only: {', '.join(self.classes)}")


def _vocabularies() -> dict[str, list[str]]:
    """Class names of the data sets; those whose classes are beside the data are left out."""
    found = {}
    for name in registry.names():
        with contextlib.suppress(UserError):
            found[name] = list(registry.spec(name).names)
    return found
