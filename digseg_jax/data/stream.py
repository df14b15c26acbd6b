# SPDX-License-Identifier: Apache-2.0
"""Training streams: batch i is a pure function of (seed, i), for any number of hosts and workers.

`random_map` comes before the host slice, so a global batch is the same set of examples however many
hosts share it, and the whole state of a stream is one integer, the next step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from digseg_jax.data.crops import Example
from digseg_jax.data.workers import start_worker, tell_shared_memory
from digseg_jax.log import log
from digseg_jax.runtime.malloc import keep_freed_memory

MakeExample = Callable[[Any, np.random.Generator], Example]  # (item of the source, random numbers)


class Batches:
    """Iterator over a stream's batches that also owns its worker processes.

    skipped: number of broken examples replaced in the batches handed out so far.
    """

    def __init__(self, batches: grain.IterDataset):
        self._batches = iter(batches)
        self.skipped = 0

    def __iter__(self) -> Iterator[Example]:
        return self

    def __next__(self) -> Example:
        # After any error, an interrupt included, the workers must not outlive the iterator.
        try:
            batch = next(self._batches)
        except BaseException:
            self.close()
            raise

        # `Guarded` counts in each example; here the counts of the batch are taken out and added up.
        if (skipped := int(batch.pop("skipped", np.zeros(1)).sum())) > 0:
            self.skipped += skipped
            log.warning("%d broken examples replaced so far", self.skipped)
        return batch

    def close(self) -> None:
        """Ends the workers; asking for another batch is then an error."""
        self._batches.close()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclasses.dataclass(frozen=True)
class Part:
    """A data set of a mixture: its source, the function that makes its examples, its weight."""

    source: Any
    make_example: MakeExample
    weight: float = 1.0


def mixed_stream(
    parts: Sequence[Part],
    *,
    seed: int,
    batch_size: int,
    start: int = 0,
    host: int = 0,
    hosts: int = 1,
    workers: int = 0,
    threads: int | None = None,
) -> Batches:
    """Endless batches from step `start`; each example carries its global "index" (uint32).

    Several sources come in the proportion of their weights, evenly interleaved. Each is shuffled and
    repeated on its own: a small one is seen again while a large one lasts.

    threads: reading threads of each worker; None: as many as a local disk needs.

    Raises:
      ValueError: the batch does not divide among the hosts.
    """
    # A seed of its own for each part, so that two parts of one size are not shuffled alike.
    datasets = []
    for k, part in enumerate(parts):
        own = int(np.random.SeedSequence([seed, k]).generate_state(1)[0])
        dataset = grain.MapDataset.source(part.source).seed(own).shuffle().repeat(None)
        datasets.append(dataset.random_map(part.make_example))

    # The index counts examples of the mixture, not of a part.
    weights = [part.weight for part in parts]
    dataset = datasets[0] if len(parts) == 1 else grain.MapDataset.mix(datasets, weights)
    dataset = dataset.map_with_index(_with_index)
    return _batches(dataset, batch_size, start, host, hosts, workers, threads)


def _batches(
    dataset: grain.MapDataset,
    batch_size: int,
    start: int,
    host: int,
    hosts: int,
    workers: int,
    threads: int | None = None,
) -> Batches:
    """Batches of an endless data set from step `start`, cut to this host's share of each.

    Raises:
      ValueError: the batch does not divide among the hosts.
    """
    if batch_size % hosts:
        raise ValueError(f"batch size {batch_size} does not divide among {hosts} hosts")

    # Hosts take contiguous parts of a global batch: the global array does not depend on
    # their number. The endless repetition is cut because grain counts its batches in
    # floats, for which 2**63 - 1 is too large.
    dataset = dataset[: 2**62]
    dataset = dataset.batch(batch_size // hosts, batch_fn=_stacked)[host::hosts][start:]

    # A disk answers at once: a worker reads and works in turn, on one core.
    if threads is None:
        threads = 0 if workers else 1
    ahead = max(4, threads) if threads else 0
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    batches = dataset.to_iter_dataset(options)

    # Worker processes share the cores between them, so OpenCV starts no threads inside them.
    if workers:
        if not flags.FLAGS.is_parsed():  # grain reads absl's flags, also outside app.run
            flags.FLAGS.mark_as_parsed()
        tell_shared_memory(workers)
        multiprocessing = grain.MultiprocessingOptions(num_workers=workers)
        batches = batches.mp_prefetch(multiprocessing, worker_init_fn=start_worker)
    else:
        keep_freed_memory()
    return Batches(batches)


def _stacked(examples: Sequence[Example]) -> Example:
    """Stacks examples to a batch, one array per key; narrow labels become int32 here."""
    types = {"label": np.int32}
    return {k: np.stack([e[k] for e in examples], dtype=types.get(k)) for k in examples[0]}


def _with_index(i: int, example: Example) -> Example:
    """The example with its global "index" (uint32)."""
    return example | {"index": np.asarray(i, np.uint32)}
