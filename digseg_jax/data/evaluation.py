# SPDX-License-Identifier: Apache-2.0
"""The examples of an evaluation split, and padded batches of them whatever their sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from digseg_jax.config import DataConfig, PartConfig
from digseg_jax.data import landcover
from digseg_jax.data.augment import IGNORE, PADDING
from digseg_jax.data.guard import Guarded
from digseg_jax.data.opening import open_part, spec_of


@dataclasses.dataclass(frozen=True)
class EvalExamples:
    """[i] -> {"image" uint8 [h, w, 3], "label" int32 [h, w], "name"}; nothing is resized.

    rows: the source's examples that are evaluated. prompts: query i stands for class i.
    """

    source: Any
    rows: tuple[int, ...]
    classes: tuple[str, ...]
    prompts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source[self.rows[index]]


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
        classes = prompts = landcover.LABEL_SETS[config.label_set]
    else:
        part = PartConfig(config.name, config.root)
        facts = spec_of(part)
        source = Guarded(open_part(part, split), facts.num_classes)
        classes, prompts = facts.names, tuple(facts.prompt(name) for name in facts.names)
    n = len(source)
    wanted = num_images if 0 < num_images < n else n
    return EvalExamples(source, tuple(i * n // wanted for i in range(wanted)), classes, prompts)


def padded_batches(
    examples: Any, batch_size: int, multiple: int = 64
) -> Iterator[tuple[dict[str, np.ndarray], list[str]]]:
    """Batches of one number of examples, and the names of the real ones among them.

    {"image" uint8 [n, H, W, 3], "label" int32 [n, H, W], "size" int32 [n, 2] (height, width),
    "index" int32 [n], "valid" bool [n]}. H and W are the largest of the batch, rounded up to
    `multiple`: a split of one size is one shape, one compiled program. Pictures sit at the top left;
    what is padding has the ignore label; the last batch is filled up with examples that are not valid.
    """
    for start in range(0, len(examples), batch_size):
        rows = range(start, min(start + batch_size, len(examples)))
        found = [examples[i] for i in rows]
        sizes = np.asarray([e["label"].shape for e in found], np.int32)
        height, width = -(-sizes.max(axis=0) // multiple) * multiple
        batch = {
            "image": np.full((batch_size, height, width, 3), PADDING, np.uint8),
            "label": np.full((batch_size, height, width), IGNORE, np.int32),
            "size": np.zeros((batch_size, 2), np.int32),
            "index": np.full(batch_size, start, np.int32),
            "valid": np.arange(batch_size) < len(found),
        }
        for k, (row, example) in enumerate(zip(rows, found, strict=True)):
            h, w = sizes[k]
            batch["image"][k, :h, :w] = example["image"]
            batch["label"][k, :h, :w] = example["label"]
            batch["size"][k], batch["index"][k] = sizes[k], row
        yield batch, [str(e["name"]) for e in found]
