# SPDX-License-Identifier: Apache-2.0
"""From the configuration to the stream of training crops, each with its queries."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from digseg_jax.config.schema import DataConfig, LoadingConfig, PartConfig
from digseg_jax.data.captions import Captions, captions_of
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
from digseg_jax.data.queries import NOWHERE, QuerySampler
from digseg_jax.data.shards.latents import LatentSource, cache_folders
from digseg_jax.data.shards.records import RecordSource, class_hash
from digseg_jax.data.sources import (
    check_labels,
    is_asked,
    open_part,
    parts_of,
    statistics_of,
    title_of,
    training_parts,
)
from digseg_jax.data.stream import Batches, MakeExample, Part, mixed_stream
from digseg_jax.data.vocabulary import foreign_rows, vocabularies
from digseg_jax.errors import UserError
from digseg_jax.io import storage
from digseg_jax.log import log

# Reading threads of a worker (grain's default): a bucket takes tens of milliseconds to send a record.
BUCKET_THREADS = 16
SAMPLED = "class frequencies: from a sample; digseg_jax.tools.prepare_data counts them once for all"


class CropWithCaption:
    """Makes a training crop with its caption, for a U-Net that generates images (task=prior).

    Example of any size -> {"image" uint8 [s, s, 3], "query" int32 [1]: the caption's id}, and what
    `Guarded` counts.
    """

    def __init__(self, rules: CropRules, captions: Captions):
        self.rules, self.captions = rules, captions

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        image, label = random_view(example["image"], example["label"], self.rules, rng)
        caption = np.asarray([self.captions.id_of(label)], np.int32)
        return {"image": image, "query": caption, "skipped": example["skipped"]}


class Repeated:
    """Source that repeats the examples of rare classes.

    counts: int [examples], how often each example occurs.
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
    """Draws queries by name for a label crop of one data set.

    Args:
      num_queries: q, queries per crop.
      sampler: draws the classes that are asked for.
      rows: for each class the prompt bank's rows of its prompts.
      covers: int32 [classes, m], the ids of each class's mask, as `cover_tables` makes them.
      foreign: [data set][class] -> rows of classes that its images cannot show (`foreign_rows`).
    """

    def __init__(
        self,
        num_queries: int,
        sampler: QuerySampler,
        rows: tuple[tuple[int, ...], ...],
        covers: np.ndarray,
        foreign: tuple[tuple[tuple[int, ...], ...], ...] = (),
    ):
        self.num_queries, self.sampler = num_queries, sampler
        self.rows, self.covers, self.foreign = rows, covers, foreign

    def draw(self, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Example]:
        """Draws class ids int32 [q], and {"query", "query_class", "query_kind"} (`CropWithNames`)."""
        classes, kinds = self.sampler.draw(label, self.num_queries, rng)

        # Any prompt of the class, evenly: synonyms and templates are trained alike.
        words = [self._foreign(rng) if c == NOWHERE else self.rows[c] for c in classes]
        query = [row[int(rng.integers(len(row)))] for row in words]

        # [q, 1] where no classes are nested: the usual batch then has plain ids, [q].
        own = self.covers[np.maximum(classes, 0)]
        covers = np.where(classes[:, None] == NOWHERE, np.int32(NOWHERE), own)
        return classes, {
            "query": np.asarray(query, np.int32),
            "query_class": covers[:, 0] if covers.shape[1] == 1 else covers,
            "query_kind": kinds,
        }

    def _foreign(self, rng: np.random.Generator) -> tuple[int, ...]:
        """Rows of a class that the image cannot show: one of the other data sets, then any class of it.

        A data set is drawn by the square root of its number of classes. Drawn evenly, each of a hundred
        names of things would hardly be asked for; drawn by class, the others would not.
        """
        shares = np.sqrt([len(classes) for classes in self.foreign])
        classes = self.foreign[int(rng.choice(len(shares), p=shares / shares.sum()))]
        return classes[int(rng.integers(len(classes)))]


class CropWithNames:
    """Makes a training crop with queries by name from an example of any size.

    The result is {"image" uint8 [s, s, 3], "label" [s, s] (int32 in a batch), "query", "query_class"
    and "query_kind" int32 [q]}, and what `Guarded` counts. "query" is a row of the run's prompt bank;
    "query_kind" says whether the crop shows the class (queries.PRESENT, ABSENT, HARD_ABSENT). If one
    of the run's data sets has nested classes, "query_class" is [q, m]: the ids that a mask covers,
    repeated to m of them. Crops of a mixture also have "part" int32, their data set's place in it.

    part: that place; None for a run on one data set.
    """

    def __init__(self, rules: CropRules, queries: NamedQueries, part: int | None = None):
        self.rules, self.queries = rules, queries
        self.part = _part(part)

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        image, label = random_view(example["image"], example["label"], self.rules, rng)
        asked = self.queries.draw(label, rng)[1] | self.part
        return {"image": image, "label": label} | asked | {"skipped": example["skipped"]}


class CachedWithNames:
    """Reads the latents of a cached crop, mirrored or not, and draws queries by name for it.

    The result has {"image_latent" float32 [h, w, c], "mask_latent" float32 [q, h, w, c]} in place of
    the "image" of `CropWithNames`, whose other entries it shares; with a palette there is one mask,
    whatever q is. The argument is the example's number, because only the draw decides which of its two
    records is read.
    """

    def __init__(
        self, source: LatentSource, flip: float, queries: NamedQueries, part: int | None = None
    ):
        self.source, self.flip, self.queries = source, flip, queries
        self.part = _part(part)

    def __call__(self, index: int, rng: np.random.Generator) -> Example:
        # Mirrored crops were encoded too, so mirroring means reading the other record.
        stored = self.source.read(index, bool(rng.random() < self.flip))
        classes, asked = self.queries.draw(stored.label, rng)

        latents = {
            "image_latent": stored.image,
            "mask_latent": self.source.masks(stored, classes),
        }
        return latents | {"label": stored.label} | asked | self.part


def _part(place: int | None) -> Example:
    """What an example says of its data set: the place in the mixture; nothing without a mixture."""
    return {} if place is None else {"part": np.asarray(place, np.int32)}


def cover_tables(specs: Sequence[DatasetSpec]) -> list[np.ndarray]:
    """Ids of each class's mask, int32 [classes, m] for each data set, with one m for all of them."""
    m = max(len(s.covers(c)) for s in specs for c in range(s.num_classes))

    # Shorter rows repeat their last id, which changes nothing about the set of ids.
    tables = []
    for s in specs:
        rows = [s.covers(c) for c in range(s.num_classes)]
        tables.append(np.asarray([(*r, *[r[-1]] * (m - len(r))) for r in rows], np.int32))
    return tables


def _members(facts: DatasetSpec) -> np.ndarray | None:
    """Table of nested classes, bool [c, c]: the ids (columns) of each mask (row); None if none nest."""
    table = np.zeros((facts.num_classes, facts.num_classes), bool)
    for c in range(facts.num_classes):
        table[c, list(facts.covers(c))] = True

    # As many entries as classes: every mask covers its own id alone.
    return table if table.sum() > facts.num_classes else None


def _parts(config: DataConfig, task: str, seed: int, on_error: str = "raise") -> list[Part]:
    """Opens the data sets of the mixture, each with the function that makes its training examples.

    Raises:
      UserError: a data set, or its cache of latents, is missing or does not fit the run.
    """
    # Prompt rows and mask ids are numbered over all data sets of the run.
    chosen = training_parts(config)
    words, covers = vocabularies(config), cover_tables([facts for _, facts, _ in chosen])
    foreign = foreign_rows(config) if config.foreign_rate else [()] * len(chosen)
    captions = captions_of(config) if task == "prior" else []
    folders = cache_folders(config.latent_cache, chosen) if config.latent_cache else []

    made, told = [], False
    for k, (part, facts, split) in enumerate(chosen):
        place = k if config.mixture else None
        asked = partial(_asked, config, part, facts, words[k].rows, covers[k], foreign[k])
        rules = _rules(config, part)
        source: Any
        make: MakeExample

        # Cached latents replace the images. Only what the data decide is checked here; the task
        # compares the rest of the cache's settings with its networks.
        if folders:
            known = {"image_size": config.image_size, "class_hash": class_hash(facts)}
            latents = LatentSource(folders[k], known)
            source = range(len(latents))
            make = CachedWithNames(latents, config.flip, asked(latents.statistics()), place)

        # Files or shards: narrow labels, because nothing before the batch needs 32 bits.
        else:
            opened = open_part(part, split, narrow=True)
            source = Guarded(opened, facts.num_classes, on_error, seed)
            if task == "prior":
                make = CropWithCaption(rules, captions[k])
            else:
                if not (told or isinstance(opened, RecordSource)):
                    log.info("%s", SAMPLED)
                    told = True
                statistics = statistics_of(opened, source)
                check_labels(facts, title_of(part), split, statistics, len(opened))
                make = CropWithNames(rules, asked(statistics), place)

            # Repeat examples of rare classes (LVIS); the guard goes around the repeated source, so
            # that replacements are drawn from it.
            if config.repeat_threshold:
                counted = opened if hasattr(opened, "class_shares") else source  # some know them
                shares = class_shares(counted, facts.num_classes)
                counts = repeat_factors(shares, config.repeat_threshold)
                source = Guarded(Repeated(opened, counts), facts.num_classes, on_error, seed)

        made.append(Part(source, make, part.weight))
        log.info("training data: %s %s, %d examples", title_of(part), split, len(source))
    return made


def _rules(config: DataConfig, part: PartConfig) -> CropRules:
    """Rules of a data set's training crops: its own where it has some, else those for all."""
    # A part's scale 1 is given in pixels of the short side; the rules count in crops.
    unit = part.short_side / config.image_size if part.short_side else 1.0
    return CropRules(
        size=config.image_size,
        scale_min=unit * (part.scale_min or config.scale_min),
        scale_max=unit * (part.scale_max or config.scale_max),
        class_share_cap=config.class_share_cap,
        flip=config.flip,
        jitter=config.jitter if part.jitter < 0 else part.jitter,
        native=config.scale_unit == "pixel" and not part.short_side,
        quarter_turns=config.quarter_turns or part.quarter_turns,
    )


def _asked(
    config: DataConfig,
    part: PartConfig,
    facts: DatasetSpec,
    rows: tuple[tuple[int, ...], ...],
    covers: np.ndarray,
    foreign: tuple[tuple[tuple[int, ...], ...], ...],
    statistics: ClassStatistics,
) -> NamedQueries:
    """Draws queries for one data set, by the class statistics of its labels."""
    # Hard negatives: classes that often occur together, or share words of their names.
    names = [(c.name, *c.synonyms) for c in facts.classes]
    sampler = QuerySampler(
        statistics.rarity(),
        config.negative_rate,
        confusable=confusable(statistics, names),
        hard_rate=config.hard_negative_rate,
        members=_members(facts),
        askable=_askable(part, facts),
        foreign_rate=config.foreign_rate if foreign else 0.0,
    )
    return NamedQueries(config.num_queries, sampler, rows, covers, foreign)


def _askable(part: PartConfig, facts: DatasetSpec) -> np.ndarray | None:
    """Classes that are asked for by name, bool [c]; None: all.

    Raises:
      UserError: the part leaves no class to ask for.
    """
    asked = np.array([is_asked(part, name) for name in facts.names])
    if not asked.any():
        raise UserError(
            f"config.data.mixture: {part.name} has only the classes {', '.join(facts.names)}"
        )
    return None if asked.all() else asked


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
    """Stream of a run's batches from step `start`; that number is the stream's whole state.

    Args:
      config: data sets, crops and queries.
      task: config.task; `prior` gets captions instead of queries.
      seed: of shuffling, crops and queries.
      batch_size: examples of a global batch, over all hosts.
      start: number of the first batch.
      host, hosts: number of this process and how many there are.
      loading: worker processes, and what a broken example does.

    Raises:
      UserError: a data set that is not there, or one that the task cannot train on.
    """
    place = {"start": start, "host": host, "hosts": hosts, "workers": loading.workers}

    # A bucket answers slowly but many at once: it needs more threads than a disk.
    places = [config.latent_cache or part.root for part in parts_of(config)]
    remote = any(storage.is_remote(place) for place in places)
    threads = BUCKET_THREADS if remote else None

    parts = _parts(config, task, seed, loading.on_error)
    return mixed_stream(parts, seed=seed, batch_size=batch_size, threads=threads, **place)
