# SPDX-License-Identifier: Apache-2.0
"""Latents of the training data, computed once by the frozen autoencoder: --mode=cache_latents.

The middle square of every training example, its short side filling the crop, is encoded as it is and
mirrored: the image, and the masks of all classes that the crop shows (with nested classes, of all that
cover them; with the palette codec, the one image of all classes). Training with the same configuration
reads `config.data.latent_cache` and runs no autoencoder.

A killed job continues with the missing shards. Several processes share the shards; each encodes with
its own devices, so none waits for another before the end.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import itertools
import json
import math
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath

from digseg_jax.config.schema import ComputeConfig, DataConfig, LoadingConfig, MeshConfig, ModelConfig
from digseg_jax.data.checked import Guarded
from digseg_jax.data.crops import central_window, view
from digseg_jax.data.datasets.spec import DatasetSpec
from digseg_jax.data.datasets.statistics import ClassStatistics
from digseg_jax.data.pipeline import cover_tables
from digseg_jax.data.shards import files
from digseg_jax.data.shards.fingerprint import KEY, UNTIMED_KEY, fingerprint
from digseg_jax.data.shards.latents import (
    ABSENT,
    FORMAT,
    MANIFEST,
    MODE,
    cache_folders,
)
from digseg_jax.data.shards.records import class_hash
from digseg_jax.data.sources import open_fresh, training_parts
from digseg_jax.errors import UserError
from digseg_jax.io.progress import Progress
from digseg_jax.io.storage import explained
from digseg_jax.log import log
from digseg_jax.runtime.compile_cache import use_compile_cache
from digseg_jax.runtime.distributed import is_main, together
from digseg_jax.runtime.sharding import make_mesh
from digseg_jax.training.tasks.latents import Crop, FrozenParts, LatentEncoder, cache_facts
from digseg_jax.training.tasks.parts import choose_kernels

SHARD_EXAMPLES = 256  # 300 MB at 512 pixels and eight classes per image
READERS = 4  # threads that decode images while the devices encode
PATIENCE = 6 * 3600.0  # seconds that the first process to finish waits for the last


def run(
    data: DataConfig,
    model: ModelConfig,
    compute: ComputeConfig,
    loading: LoadingConfig,
    batch_size: int,
) -> None:
    """Writes CACHE/NAME/SPLIT for every data set that is trained on; see `data.shards.latents`.

    batch_size: images of a train step; no more are encoded at a time.

    Raises:
      UserError: no place is named or it cannot be written, a folder holds shards of another cache, or
        an example is broken (unless `config.loading.on_error` says to skip it).
    """
    if not data.latent_cache:
        raise UserError(f"{MODE} needs --config.data.latent_cache=DIR or gs://BUCKET/DIR")

    with together("the weights and the data"):
        use_compile_cache(compute.compile_cache)

        # Each process works alone on its own devices, with its share of the batch.
        devices = jax.local_devices()
        kernels = choose_kernels(compute, devices, model.dtype, tensor=1)
        frozen = FrozenParts(data, model, kernels)
        rows = math.ceil(batch_size / jax.process_count())
        encoder = LatentEncoder(frozen, make_mesh(MeshConfig(data=1, fsdp=-1), devices), rows)

        # The same settings go into every plan, so that training can tell whether a cache fits.
        facts = cache_facts(frozen, data.image_size, model)
        parts = training_parts(data)
        tables = cover_tables([spec for _, spec, _ in parts])
        folders = cache_folders(data.latent_cache, parts)
        found = [open_fresh(part, split) for part, _, split in parts]

    for (_, spec, split), opened, table, folder in zip(parts, found, tables, folders, strict=True):
        source = Guarded(opened, spec.num_classes)
        with together("the names of the files"):
            names = {KEY: fingerprint(opened), UNTIMED_KEY: fingerprint(opened, times=False)}
        plan = {
            "format": FORMAT,
            "dataset": spec.name,
            "split": split,
            "source_examples": len(source),
            **names,
            "shard_examples": SHARD_EXAMPLES,
            "on_error": loading.on_error,
            "class_hash": class_hash(spec),
            **facts,
        }
        SplitWriter(source, spec, folder, plan, encoder, table).run()


@dataclasses.dataclass(frozen=True)
class SplitWriter:
    """Writer of one data set's cache.

    Attributes:
      source: checked examples of the split.
      plan: what the cache is made with, JSON-ready.
      covers: int32 [classes, m], the ids of each class's mask.
    """

    source: Guarded
    spec: DatasetSpec
    folder: epath.Path
    plan: dict[str, Any]
    encoder: LatentEncoder
    covers: np.ndarray

    def run(self) -> None:
        """Writes the missing shards, then the manifest; every process must call it.

        Raises:
          UserError: as `cache_latents.run`, on every process.
        """
        # Process 0 claims the folder for this plan.
        with together("the folder of the latents"):
            if is_main():
                with explained(self.folder, "cannot be written"):
                    self.folder.mkdir(parents=True, exist_ok=True)
                    files.claim(self.folder, self.plan, "another config.data.latent_cache")

        # All processes look before one of them writes; afterwards they would
        # see different numbers of shards.
        with together("a look at the latents"):
            if not (self.folder / files.PLAN).exists():
                raise UserError(
                    f"{self.folder}: process 0 wrote {files.PLAN} there, this process does not "
                    "see it; use storage that all hosts share, such as gs://"
                )
            done = (self.folder / MANIFEST).exists()
            todo = [] if done else files.missing(self.folder, self.shards)
        if done:
            log.info("%s: complete already", self.folder)
            return

        # Every n-th missing shard is this process's.
        log.info("%s: %d of %d shards to write", self.folder, len(todo), self.shards)
        with together("the latents", PATIENCE):
            self._write(todo[jax.process_index() :: jax.process_count()])
        with together("the manifest of the latents"):
            if is_main():
                self._finish()

    @property
    def shards(self) -> int:
        """Number of shards, the last one perhaps smaller."""
        return -(-self.plan["source_examples"] // self.plan["shard_examples"])

    def _rows(self, shard: int) -> range:
        """Indices of a shard's examples in the source."""
        step = self.plan["shard_examples"]
        return range(self.plan["source_examples"])[shard * step : (shard + 1) * step]

    def _write(self, shards: list[int]) -> None:
        """Writes shards one by one, showing the progress in images."""
        total = sum(len(self._rows(shard)) for shard in shards)
        progress = Progress(total, label="latents", unit="images")
        start, done = time.monotonic(), 0
        for shard in shards:
            for count in self._write_shard(shard):
                done += count
                progress.update(done, done / (time.monotonic() - start))
        progress.close()

    def _write_shard(self, shard: int) -> Iterator[int]:
        """Writes one shard; yields the numbers of examples as they are done.

        Calls of the encoder never reach across shards, so a shard's bytes do not depend on where a
        killed job continues.
        """
        statistics = ClassStatistics.empty(self.spec.num_classes)
        broken: list[str] = []
        with files.new_shard(self.folder, shard, self.shards) as (writer, facts):
            crops = self._crops(self._rows(shard))
            while chunk := list(itertools.islice(crops, self.encoder.rows)):
                # broken examples take a place in the chunk, but none in the shard
                whole = [crop for crop in chunk if isinstance(crop, Crop)]
                broken += [str(error) for error in chunk if isinstance(error, UserError)]
                for record in self.encoder.records(whole, self.covers) if whole else ():
                    writer.write(record)
                for crop in whole:
                    statistics.add(crop.label)
                yield len(chunk)

            # Goes into the sidecar when the shard is in place.
            facts |= {
                "examples": statistics.examples,
                "broken": broken,
                "statistics": statistics.to_dict(),
            }

    def _crops(self, rows: range) -> Iterator[Crop | UserError]:
        """Crops in the order of `rows`, read ahead by threads; for a broken example its error."""
        with ThreadPoolExecutor(READERS) as pool:
            pending = collections.deque[Future[Crop | UserError]]()
            for index in rows:
                # at most two calls of the encoder ahead: crops wait in memory
                pending.append(pool.submit(self._crop, index))
                if len(pending) > 2 * self.encoder.rows:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _crop(self, index: int) -> Crop | UserError:
        """Reads one example and cuts its middle square; for a broken one that is skipped, its error."""
        try:
            example = self.source[index]
        except UserError as error:
            if self.plan["on_error"] == "raise":
                raise
            return error

        # Where one image shows all classes, no list is needed.
        size, label = self.encoder.size, example["label"]
        height, width = label.shape
        image, label = view(example["image"], label, central_window(height, width, size), size)
        classes = shown_classes(label, self.spec) if self.encoder.one_by_one else ()
        return Crop(str(example["name"]), image, label, classes)

    def _finish(self) -> None:
        """Sums the sidecars up to the manifest, and removes them.

        Raises:
          UserError: every example is broken, or a file cannot be written.
        """
        statistics = ClassStatistics.empty(self.spec.num_classes)
        rows, broken = files.sidecars(self.folder, self.shards), []
        for row in rows:
            statistics.merge(ClassStatistics.from_dict(row.pop("statistics")))
            broken += row.pop("broken")
        if not statistics.examples:
            raise UserError(f"{self.folder}: no example is whole; the first: {broken[:1]}")

        # The plan is part of the manifest: training compares it with its own settings.
        manifest = self.plan | {
            "examples": statistics.examples,
            "shards": rows,
            "broken": broken,
            "statistics": statistics.to_dict(),
        }

        # All absent classes share one latent, stored once.
        absent = io.BytesIO()
        if self.encoder.one_by_one:
            np.save(absent, self.encoder.absent(self.covers))
            manifest["absent_sha256"] = hashlib.sha256(absent.getvalue()).hexdigest()

        # The manifest marks the cache as complete, so it is written after all other files.
        with explained(self.folder, "cannot be written"):
            if self.encoder.one_by_one:
                files.write(self.folder / ABSENT, absent.getvalue())
            files.write(self.folder / MANIFEST, json.dumps(manifest).encode())
            files.remove_sidecars(self.folder, self.shards)

        # Repeated at the end, where it is not overlooked.
        for line in broken:
            log.warning("left out: %s", line)
        size = sum(row["bytes"] for row in rows) / 1e9
        log.info("%s: %d examples, %.3f GB", self.folder, statistics.examples, size)


def shown_classes(label: np.ndarray, spec: DatasetSpec) -> tuple[int, ...]:
    """Classes whose masks show at least one pixel of a label map with ignore = -1."""
    ids = set(np.unique(label).tolist())
    return tuple(c for c in range(spec.num_classes) if not ids.isdisjoint(spec.covers(c)))
