# SPDX-License-Identifier: Apache-2.0
"""What is trained on: from the configuration to a stream of crops with queries."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from digseg_jax.config.schema import DataConfig, LoadingConfig
from digseg_jax.data.captions import Captions
from digseg_jax.data.checked import Guarded
from digseg_jax.data.crops import CropRules, Example, random_view
from digseg_jax.data.datasets.registry import Source
from digseg_jax.data.datasets.spec import DatasetSpec
from digseg_jax.data.datasets.statistics import (
    ClassStatistics,
    class_shares,
    confusable,
    repeat_factors,
)
from digseg_jax.data.queries import QuerySampler
from digseg_jax.data.shards.latents import LatentSource, cache_folders
from digseg_jax.data.shards.records import class_hash
from digseg_jax.data.sources import (
    check_labels,
    open_part,
    parts_of,
    statistics_of,
    training_parts,
)
from digseg_jax.data.stream import Batches, MakeExample, Part, mixed_stream
from digseg_jax.data.vocabulary import vocabularies
from digseg_jax.io import storage
from digseg_jax.log import log

BUCKET_THREADS = 16  # of a worker: a record of a bucket takes tens of milliseconds to come (grain's)


class CropWithCaption:
    """Example of any size -> {"image" uint8 [s, s, 3], "query" int32 [1]: the caption's id}."""

    def __init__(self, rules: CropRules, captions: Captions):
        self.rules, self.captions = rules, captions

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        image, label = random_view(example["image"], example["label"], self.rules, rng)
        caption = np.asarray([self.captions.id_of(label)], np.int32)
        return {"image": image, "query": caption, "skipped": example["skipped"]}


class Repeated:
    """A source with some examples several times: those of rare classes.

    counts: int [examples], how often each.
    """

    def __init__(self, source: Source, counts: np.ndarray):
        self.source, self.rows = source, np.repeat(np.arange(len(source)), counts)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.rows[index])]

    def files(self, index: int) -> dict[str, Any]:
        return self.source.files(int(self.rows[index]))


class NamedQueries:
    """Queries by name for a label crop of one data set.

    rows[class]: the bank's rows of its prompts. covers: int32 [classes, m], the ids of each class's
    mask, repeated to one m for all data sets of the run.
    """

    def __init__(
        self,
        num_queries: int,
        sampler: QuerySampler,
        rows: tuple[tuple[int, ...], ...],
        covers: np.ndarray,
    ):
        self.num_queries, self.sampler = num_queries, sampler
        self.rows, self.covers = rows, covers

    def draw(self, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Example]:
        """Class ids int32 [q], and {"query", "query_class", "query_kind"} as `CropWithNames` has it."""
        classes, kinds = self.sampler.draw(label, self.num_queries, rng)
        words = [self.rows[c] for c in classes]
        query = [row[int(rng.integers(len(row)))] for row in words]
        covers = self.covers[classes]
        return classes, {
            "query": np.asarray(query, np.int32),
            "query_class": covers[:, 0] if covers.shape[1] == 1 else covers,
            "query_kind": kinds,
        }


class CropWithNames:
    """Example of any size -> a training crop with queries by name.

    {"image" uint8 [s, s, 3], "label" [s, s] (int32 in a batch), "query", "query_class" and "query_kind"
    int32 [q]}
    and what `Guarded` counts. "query" is a row of the run's prompt bank; "query_kind" tells whether
    the crop shows the class (queries.PRESENT, ABSENT, HARD_ABSENT). If one of the run's data sets has
    nested classes, "query_class" is [q, m]: the ids that a mask covers, repeated to m of them.
    """

    def __init__(
        self,
        rules: CropRules,
        num_queries: int,
        sampler: QuerySampler,
        rows: tuple[tuple[int, ...], ...],
        covers: np.ndarray,
    ):
        self.rules = rules
        self.queries = NamedQueries(num_queries, sampler, rows, covers)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        image, label = random_view(example["image"], example["label"], self.rules, rng)
        asked = self.queries.draw(label, rng)[1]
        return {"image": image, "label": label} | asked | {"skipped": example["skipped"]}


class CachedWithNames:
    """Number of a cached example -> latents of its crop, mirrored or not, with queries by name.

    {"image_latent" float32 [h, w, c], "mask_latent" float32 [q, h, w, c]} in the place of "image" of
    `CropWithNames`; with a palette there is one mask, whatever q is. It takes numbers, because only
    the draw decides which of an example's two records is read.
    """

    def __init__(
        self,
        source: LatentSource,
        flip: float,
        num_queries: int,
        sampler: QuerySampler,
        rows: tuple[tuple[int, ...], ...],
        covers: np.ndarray,
    ):
        self.source, self.flip = source, flip
        self.queries = NamedQueries(num_queries, sampler, rows, covers)

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        stored = self.source.read(index, bool(rng.random() < self.flip))
        classes, asked = self.queries.draw(stored.label, rng)
        latents = {
            "image_latent": stored.picture,
            "mask_latent": self.source.masks(stored, classes),
        }
        return latents | {"label": stored.label} | asked


def cover_tables(specs: Sequence[DatasetSpec]) -> list[np.ndarray]:
    """int32 [classes, m] for each data set, with one m for all: the ids of each class's mask."""
    m = max(len(s.covers(c)) for s in specs for c in range(s.num_classes))
    tables = []
    for s in specs:
        rows = [s.covers(c) for c in range(s.num_classes)]
        tables.append(np.asarray([(*r, *[r[-1]] * (m - len(r))) for r in rows], np.int32))
    return tables


def _members(facts: DatasetSpec) -> np.ndarray | None:
    """bool [c, c] for nested classes, else None: every mask is its own id's."""
    table = np.zeros((facts.num_classes, facts.num_classes), bool)
    for c in range(facts.num_classes):
        table[c, list(facts.covers(c))] = True
    return table if table.sum() > facts.num_classes else None


def _parts(config: DataConfig, task: str, seed: int, on_error: str = "raise") -> list[Part]:
    """Raises UserError: a data set, or its cache of latents, that is not there."""
    chosen = training_parts(config)
    words, covers = vocabularies(config), cover_tables([facts for _, facts, _ in chosen])
    folders = cache_folders(config.latent_cache, chosen) if config.latent_cache else []
    made = []
    for k, (part, facts, split) in enumerate(chosen):
        asked = partial(_asked, config, facts, words[k].rows, covers[k])
        source: Any
        make: MakeExample
        if folders:
            known = {"image_size": config.image_size, "class_hash": class_hash(facts)}
            latents = LatentSource(folders[k], known)
            source = range(len(latents))
            make = CachedWithNames(latents, config.flip, *asked(latents.statistics()))
        else:
            opened = open_part(part, split, narrow=True)
            source = Guarded(opened, facts.num_classes, on_error, seed)
            if task == "prior":
                make = CropWithCaption(_rules(config), Captions(facts))
            else:
                statistics = statistics_of(opened, source)
                check_labels(facts, split, statistics, len(opened))
                make = CropWithNames(_rules(config), *asked(statistics))
            if config.repeat_threshold:
                shares = class_shares(opened, facts.num_classes)
                counts = repeat_factors(shares, config.repeat_threshold)
                source = Guarded(Repeated(opened, counts), facts.num_classes, on_error, seed)
        made.append(Part(source, make, part.weight))
        log.info("training data: %s %s, %d examples", part.name, split, len(source))
    return made


def _rules(config: DataConfig) -> CropRules:
    return CropRules(
        size=config.image_size,
        scale_min=config.scale_min,
        scale_max=config.scale_max,
        class_share_cap=config.class_share_cap,
        flip=config.flip,
        jitter=config.jitter,
        native=config.scale_unit == "pixel",
        quarter_turns=config.quarter_turns,
    )


def _asked(
    config: DataConfig,
    facts: DatasetSpec,
    rows: tuple[tuple[int, ...], ...],
    covers: np.ndarray,
    statistics: ClassStatistics,
) -> tuple[int, QuerySampler, tuple[tuple[int, ...], ...], np.ndarray]:
    """The arguments of `NamedQueries`."""
    names = [(c.name, *c.synonyms) for c in facts.classes]
    sampler = QuerySampler(
        statistics.rarity(),
        config.negative_rate,
        confusable=confusable(statistics, names),
        hard_rate=config.hard_negative_rate,
        members=_members(facts),
    )
    return config.num_queries, sampler, rows, covers


def training_stream(
    config: DataConfig,
    task: str,
    *,
    seed: int,
    batch_size: int,
    start: int,
    host: int,
    hosts: int,
    loading: LoadingConfig,
) -> Batches:
    """The batches of a run from step `start`: its whole state is that number.

    Raises:
      UserError: a data set that is not there, or one that the task cannot train on.
    """
    place = {"start": start, "host": host, "hosts": hosts, "workers": loading.workers}
    places = [config.latent_cache or part.root for part in parts_of(config)]
    remote = any(storage.is_remote(place) for place in places)
    threads = BUCKET_THREADS if remote else None
    parts = _parts(config, task, seed, loading.on_error)
    return mixed_stream(parts, seed=seed, batch_size=batch_size, threads=threads, **place)
