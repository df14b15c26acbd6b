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
from digseg_jax.segmentation.resolution import to_short_side


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
    examples: Any, batch_size: int, multiple: int = 64, short_side: int = 0
) -> Iterator[tuple[dict[str, np.ndarray], list[str]]]:
    """Batches of one number of examples, and the names of the real ones among them.

    {"image" uint8 [n, H, W, 3], "label" int32 [n, H, W], "size" int32 [n, 2] (height, width),
    "index" int32 [n], "valid" bool [n]}. H and W are the largest of the batch, rounded up to
    `multiple`: a split of one size is one shape, one compiled program. Pictures sit at the top left;
    what is padding has the ignore label; the last batch is filled up with examples that are not valid.

    short_side: pictures (never labels) are brought to it, and "image" has an H and W of its own;
    "image_size" int32 [n, 2] is then what they fill of it.
    """
    for start in range(0, len(examples), batch_size):
        rows = range(start, min(start + batch_size, len(examples)))
        found = [examples[i] for i in rows]
        labels = [e["label"] for e in found]
        pictures = [e["image"] for e in found]
        if short_side:
            pictures = [to_short_side(picture, short_side) for picture in pictures]
        unused = batch_size - len(found)
        batch = {
            "image": _stacked(pictures, batch_size, multiple, PADDING),
            "label": _stacked(labels, batch_size, multiple, IGNORE).astype(np.int32),
            "size": _sizes(labels, unused),
            "index": np.asarray([*rows, *[start] * unused], np.int32),
            "valid": np.arange(batch_size) < len(found),
        }
        if short_side:
            batch["image_size"] = _sizes(pictures, unused)
        yield batch, [str(e["name"]) for e in found]


def _stacked(values: list[np.ndarray], count: int, multiple: int, fill: int) -> np.ndarray:
    """[count, H, W, ...] of arrays [h, w, ...] at the top left of each."""
    height, width = (-(-max(v.shape[axis] for v in values) // multiple) * multiple for axis in (0, 1))
    out = np.full((count, height, width, *values[0].shape[2:]), fill, values[0].dtype)
    for k, value in enumerate(values):
        out[k, : value.shape[0], : value.shape[1]] = value
    return out


def _sizes(values: list[np.ndarray], unused: int) -> np.ndarray:
    """int32 [n + unused, 2]; the unused ones, which nothing is read from, say 1."""
    return np.asarray([*(v.shape[:2] for v in values), *[(1, 1)] * unused], np.int32)
