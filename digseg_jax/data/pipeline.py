# SPDX-License-Identifier: Apache-2.0
"""The training stream: batch i is a pure function of (seed, i), for any number of hosts and workers.

`random_map` comes before the host slice, so a global batch is the same set of examples however many
hosts share it, and the whole state of the stream is one integer, the next step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from digseg_jax.config import DataConfig
from digseg_jax.data import landcover
from digseg_jax.data.landcover_prompts import caption_id, training_prompts
from digseg_jax.data.queries import QuerySampler, rarity
from digseg_jax.data.transforms import Example, random_crop, random_dihedral
from digseg_jax.errors import UserError

MakeExample = Callable[[Example, np.random.Generator], Example]


def stream(
    source: Any,
    make_example: MakeExample,
    *,
    seed: int,
    batch_size: int,
    start: int = 0,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
) -> Iterator[Example]:
    """Endless batches from step `start`; each example carries its global "index" (uint32).

    Raises:
      ValueError: the batch does not divide among the hosts.
    """
    if batch_size % hosts:
        raise ValueError(f"batch size {batch_size} does not divide among {hosts} hosts")
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat(None)
    dataset = dataset.map_with_index(lambda i, example: example | {"index": np.uint32(i)})
    dataset = dataset.random_map(_keep_index(make_example))
    # whole parts of the batch: the global array is the same one for any number of hosts. The endless
    # repetition is cut because grain counts its batches in floats, which 2**63 - 1 does not survive
    dataset = dataset[: 2**62].batch(batch_size // hosts)[host::hosts][start:]
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    batches = dataset.to_iter_dataset(options)
    if workers:
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(batches)


def _keep_index(make_example: MakeExample) -> MakeExample:
    def mapped(example: Example, rng: np.random.Generator) -> Example:
        index = example.pop("index")
        return make_example(example, rng) | {"index": index}

    return mapped


class CropWithQueries:
    """Scene -> {"image" uint8 [s, s, 3], "label" int32 [s, s], "query" and "query_class" int32 [q]}.

    One of `train_label_sets` is drawn per example; "query" is an id of the prompt bank (a synonym
    of the class), "query_class" the class whose mask the device makes from "label".
    """

    def __init__(self, config: DataConfig, samplers: dict[str, QuerySampler]):
        self.config, self.samplers = config, samplers
        _, self.prompt_ids = training_prompts(config.train_label_sets)

    def __call__(self, scene: Example, rng: np.random.Generator) -> Example:
        crop = random_dihedral(random_crop(scene, self.config.image_size, rng), rng)
        label_set = self.config.train_label_sets[int(rng.integers(len(self.samplers)))]
        label = np.ascontiguousarray(crop[label_set])
        classes = self.samplers[label_set](label, self.config.num_queries, rng)
        prompts = [rng.choice(self.prompt_ids[label_set][c]) for c in classes]
        return {
            "image": np.ascontiguousarray(crop["image"]),
            "label": label,
            "query": np.asarray(prompts, np.int32),
            "query_class": classes,
        }


class CropWithCaption:
    """Scene -> {"image" uint8 [s, s, 3], "query" int32 [1]: the caption's id}."""

    def __init__(self, config: DataConfig):
        self.config = config

    def __call__(self, scene: Example, rng: np.random.Generator) -> Example:
        crop = random_dihedral(random_crop(scene, self.config.image_size, rng), rng)
        caption = np.asarray([caption_id(crop["groups"])], np.int32)
        return {"image": np.ascontiguousarray(crop["image"]), "query": caption}


def training_stream(
    config: DataConfig, task: str, *, seed: int, batch_size: int, start: int, host: int, hosts: int
) -> Iterator[Example]:
    """The stream of a task ("segmentation", "autoencoder" or "prior") over the training tiles.

    Raises:
      UserError: a crop larger than the scenes.
    """
    if config.image_size > landcover.SCENE:
        raise UserError(f"config.data.image_size={config.image_size}: at most {landcover.SCENE}")
    cover = landcover.load()
    tiles = cover.tiles("train")
    shares = {s: landcover.class_shares(cover, tiles, s) for s in config.train_label_sets}
    repeats = landcover.repeat_factors(shares[config.train_label_sets[0]], config.repeat_threshold)
    source = landcover.TrainScenes(cover, tiles, repeats)
    samplers = {s: QuerySampler(rarity(v), config.negative_rate) for s, v in shares.items()}
    make = CropWithCaption(config) if task == "prior" else CropWithQueries(config, samplers)
    return stream(
        source,
        make,
        seed=seed,
        batch_size=batch_size,
        start=start,
        host=host,
        hosts=hosts,
        workers=config.workers,
    )
