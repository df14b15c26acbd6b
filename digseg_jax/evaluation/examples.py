# SPDX-License-Identifier: Apache-2.0
"""Examples of an evaluation split, with the properties of the data set that its scores depend on."""

from __future__ import annotations

import dataclasses
from typing import Any

from digseg_jax.config.schema import DataConfig
from digseg_jax.config.templates import PLACE
from digseg_jax.data.checked import Guarded
from digseg_jax.data.datasets.spec import Color
from digseg_jax.data.shards.fingerprint import fingerprint
from digseg_jax.data.sources import is_asked, open_fresh, scored_part, spec_of


@dataclasses.dataclass(frozen=True)
class EvalExamples:
    """Random access to a split: [i] -> {"image" uint8 [h, w, 3], "label" int32 [h, w], "name"}.

    Images keep their own size, and label -1 is ignored.

    Attributes:
      rows: indices of the source's examples that are evaluated.
      covers: for each class the ids whose pixels belong to its mask; several where classes are nested.
      metric, absent, inference, template: see `DatasetSpec`. A metric "asked" is the mean IoU of the
        classes that are asked for and occur.
      colors: official RGB of each class, None for a class without; empty: none has one.
      wrong_names: words for what no image of the data set can show.
      short_side: pixels of an image's short side as it is seen; None: the segmenter's own.
      rest: id of a class that is never asked for: what no other class claims; -1: none.
      timed: whether the times of the files tell a change; those of a package tell its installation.
    """

    source: Any
    split: str
    rows: tuple[int, ...]
    classes: tuple[str, ...]
    covers: tuple[tuple[int, ...], ...]
    metric: str = "miou"
    absent: str = "mmseg"
    inference: str = "window"
    template: str = PLACE
    short_side: int | None = None
    rest: int = -1
    wrong_names: tuple[str, ...] = ()
    colors: tuple[Color | None, ...] = ()
    timed: bool = True

    @property
    def asked(self) -> tuple[int, ...]:
        """Ids of the classes that are asked for."""
        return tuple(c for c in range(len(self.classes)) if c != self.rest)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[self.rows[index]]

    def digest(self) -> str:
        """Digest of the split's files: their names, sizes and times, or their shards' checksums.

        What was counted holds for these files: a corrected mask is another one.
        """
        return fingerprint(self.source.source, times=self.timed)  # of what `Guarded` reads

    def first(self, count: int) -> EvalExamples:
        """The first `count` examples."""
        return dataclasses.replace(self, rows=self.rows[:count])

    def evenly(self, count: int) -> EvalExamples:
        """`count` evenly spread examples; all of them if there are not more."""
        if count >= len(self):
            return self
        return dataclasses.replace(self, rows=tuple(self.rows[i] for i in spread(len(self), count)))


def eval_examples(config: DataConfig, split: str, num_images: int = 0) -> EvalExamples:
    """Opens the examples of a split of `scored_part`: all, or `num_images` evenly spread ones.

    A broken example raises an error here, whatever `loading.on_error` says: a score over fewer images
    would be another score.

    Raises:
      UserError: no such data set, split or folder, or shards older than the files beside them.
    """
    # `Guarded` checks each label's size and ids when the example is read.
    part = scored_part(config)
    facts = spec_of(part)
    source = Guarded(open_fresh(part, split), facts.num_classes)

    # The word of a class that nobody asked for in the training, such as a background, means nothing.
    rest = [c for c, name in enumerate(facts.names) if not is_asked(part, name)]

    # Properties of the data set that its scores depend on travel with the examples.
    return EvalExamples(
        source,
        split,
        spread(len(source), num_images),
        facts.names,
        tuple(facts.covers(c) for c in range(facts.num_classes)),
        facts.metric,
        facts.absent,
        facts.inference,
        facts.template,
        rest=rest[0] if rest else -1,
        colors=facts.colors,
        timed=not facts.from_package,
    )


def spread(count: int, wanted: int) -> tuple[int, ...]:
    """`wanted` indices below `count`, evenly spread; all of them if `wanted` is 0 or too large."""
    wanted = wanted if 0 < wanted < count else count
    return tuple(i * count // wanted for i in range(wanted))
