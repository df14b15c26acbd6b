# SPDX-License-Identifier: Apache-2.0
"""The examples of an evaluation split, and what its scores have to know of the data set."""

from __future__ import annotations

import dataclasses
from typing import Any

from digseg_jax.config.schema import DataConfig, PartConfig
from digseg_jax.data.checked import Guarded
from digseg_jax.data.datasets import landcover
from digseg_jax.data.sources import open_part, spec_of


@dataclasses.dataclass(frozen=True)
class EvalExamples:
    """[i] -> {"image" uint8 [h, w, 3], "label" int32 [h, w], "name"}; nothing is resized.

    rows: the source's examples that are evaluated. prompts: query i stands for class i. covers: ids
    whose pixels belong to the mask of each class; more than its own where classes are nested. metric,
    absent, inference: see `DatasetSpec`.
    """

    source: Any
    split: str
    rows: tuple[int, ...]
    classes: tuple[str, ...]
    prompts: tuple[str, ...]
    covers: tuple[tuple[int, ...], ...]
    metric: str = "miou"
    absent: str = "mmseg"
    inference: str = "window"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[self.rows[index]]

    def first(self, count: int) -> EvalExamples:
        """The first `count` of them."""
        return dataclasses.replace(self, rows=self.rows[:count])


def eval_examples(config: DataConfig, split: str, num_images: int = 0) -> EvalExamples:
    """The examples of a split of `config.name`; `num_images` of them, evenly spread, if it is set.

    A broken example is an error here, whatever `config.on_error` says: a score over fewer images
    would be another score.

    Raises:
      UserError: no such data set, split or folder.
    """
    if config.name == "landcover":
        cover = landcover.load()
        source: Any = landcover.EvalTiles(cover, cover.tiles(split), config.label_set)
        names = landcover.LABEL_SETS[config.label_set]
        alone = tuple((c,) for c in range(len(names)))
        return EvalExamples(source, split, _spread(len(source), num_images), names, names, alone)

    part = PartConfig(config.name, config.root)
    facts = spec_of(part)
    source = Guarded(open_part(part, split), facts.num_classes)
    return EvalExamples(
        source,
        split,
        _spread(len(source), num_images),
        facts.names,
        tuple(facts.prompt(name) for name in facts.names),
        tuple(facts.covers(c) for c in range(facts.num_classes)),
        facts.metric,
        facts.absent,
        facts.inference,
    )


def _spread(count: int, wanted: int) -> tuple[int, ...]:
    """`wanted` of `count` indices, evenly spread; all of them for 0."""
    wanted = wanted if 0 < wanted < count else count
    return tuple(i * count // wanted for i in range(wanted))
