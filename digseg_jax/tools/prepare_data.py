# SPDX-License-Identifier: Apache-2.0
"""python -m digseg_jax.tools.prepare_data --dataset=NAME --root=DIR --out=gs://BUCKET/DIR | DIR

Packs a download into ArrayRecord shards (for their format see data/shards/records.py). A killed job
continues with the missing shards; --renew makes those of changed files again. Train from the result
with --config.data.root=OUT.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from etils import epath

from digseg_jax.data.checked import Guarded
from digseg_jax.data.datasets import registry
from digseg_jax.data.datasets.registry import Source
from digseg_jax.data.datasets.spec import DatasetSpec
from digseg_jax.data.datasets.statistics import ClassStatistics
from digseg_jax.data.shards import files, records
from digseg_jax.data.shards.fingerprint import KEY, UNTIMED_KEY, fingerprint
from digseg_jax.errors import UserError
from digseg_jax.io.storage import as_path, explained
from digseg_jax.log import log, setup
from digseg_jax.runtime.door import run_tool

SHARD_EXAMPLES = 1000  # COCO: 119 shards of about 170 MB
OpenSplit = Callable[[], Source]  # opens the split in the process that reads it


def prepare_split(
    open_split: OpenSplit,
    spec: DatasetSpec,
    split: str,
    out: str | Path,
    *,
    shard_examples: int = SHARD_EXAMPLES,
    workers: int = 0,
    on_error: str = "raise",
    renew: bool = False,
) -> dict[str, Any]:
    """Writes the missing shards of a split and its manifest; returns the manifest.

    Args:
      open_split: opens the source; called in every worker process.
      workers: number of worker processes; 0 works in this process.
      on_error: "skip" leaves broken examples out and counts them; "raise" stops at the first one.
      renew: replace shards of other examples, classes or shard sizes.

    Raises:
      UserError: a broken example; or OUT holds shards of other examples, classes or shard sizes.
    """
    # Opened first: an empty folder of OUT might be taken for one of the data set's own.
    source = open_split()
    folder = epath.Path(as_path(out)) / split
    with explained(folder, "cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)

    # The plan is everything that the content of the shards depends on.
    shards = -(-len(source) // shard_examples)
    plan = {
        "format": records.FORMAT,
        "dataset": spec.name,
        "split": split,
        "class_hash": records.class_hash(spec),
        "spec": records.facts_of(spec),
        records.VALUES: records.values_of(spec),
        "source_examples": len(source),
        KEY: fingerprint(source),
        UNTIMED_KEY: fingerprint(source, times=False),
        "shard_examples": shard_examples,
        "on_error": on_error,
    }
    if renew:
        files.clear(folder, plan, records.MANIFEST)
    files.claim(folder, plan, "another --out, or replace them with --renew")

    # The manifest is written last, so its presence means that nothing is left to do.
    if (folder / records.MANIFEST).exists():
        log.info("%s %s: complete already", spec.name, split)
        return records.read_manifest(folder, spec)

    # Shards are independent of each other and of the order in which they are written.
    todo = files.missing(folder, shards)
    log.info("%s %s: %d of %d shards to write", spec.name, split, len(todo), shards)
    job = partial(_write_shard, open_split, spec, str(folder), shards, shard_examples, on_error)
    if workers and todo:
        _in_parallel(job, todo, min(workers, len(todo)))
    else:
        for shard in todo:
            job(shard)

    return _finish(folder, plan, shards)


def _in_parallel(job: Callable[[int], None], shards: list[int], workers: int) -> None:
    """Runs `job` on every shard in worker processes.

    After the first error no further shard is begun; those in work are finished.
    """
    # Spawned, not forked: forking a process with threads (grain, OpenCV) can lock up.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            for future in [pool.submit(job, shard) for shard in shards]:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write_shard(
    open_split: OpenSplit,
    spec: DatasetSpec,
    folder: str,
    shards: int,
    shard_examples: int,
    on_error: str,
    shard: int,
) -> None:
    """Writes one shard and, when it is in place, its sidecar."""
    source = Guarded(open_split(), spec.num_classes)
    start = shard * shard_examples
    statistics = ClassStatistics.empty(spec.num_classes)
    broken: list[str] = []

    # A broken example leaves no gap: records are counted, not numbered.
    with files.new_shard(epath.Path(folder), shard, shards) as (writer, facts):
        for i in range(start, min(start + shard_examples, len(source))):
            try:
                example = source[i]
            except UserError as error:
                if on_error == "raise":
                    raise
                broken.append(str(error))
                continue
            statistics.add(example["label"])
            writer.write(_record(source.source, i, example))

        # Goes into the sidecar, and from there into the manifest.
        facts |= {
            "examples": statistics.examples,
            "broken": broken,
            "statistics": statistics.to_dict(),
        }


def _record(source: Source, index: int, example: dict[str, Any]) -> bytes:
    """Bytes of one example; the source's JPEG is offered to be stored as it is."""
    data = source.files(index)["image"].read_bytes() if source.image_is_file else b""
    jpeg = data if data.startswith(b"\xff\xd8") else None  # the first bytes of every JPEG
    return records.encode_record(example["image"], example["label"], str(example["name"]), jpeg)


def _finish(folder: epath.Path, plan: dict[str, Any], shards: int) -> dict[str, Any]:
    """Sums the sidecars up to the manifest, and removes them."""
    statistics = ClassStatistics.empty(len(plan["spec"]["classes"]))
    rows, broken = files.sidecars(folder, shards), []
    for row in rows:
        statistics.merge(ClassStatistics.from_dict(row.pop("statistics")))
        broken += row.pop("broken")

    # Manifest first: a job killed in between finds the split complete.
    counted = {"examples": statistics.examples, "shards": rows, "broken": broken}
    manifest = plan | counted | {"statistics": statistics.to_dict()}
    files.write(folder / records.MANIFEST, json.dumps(manifest).encode())
    files.remove_sidecars(folder, shards)
    return manifest


def _parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m digseg_jax.tools.prepare_data", description=__doc__
    )
    parser.add_argument("--dataset", required=True, help="a name of the registry")
    parser.add_argument("--root", required=True, help="the download, as it unpacks")
    parser.add_argument("--out", required=True, help="folder or gs://BUCKET/FOLDER")
    parser.add_argument("--split", action="append", help="may be repeated; default: train and eval")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--shard-examples", type=int, default=SHARD_EXAMPLES)
    parser.add_argument("--on-error", choices=("raise", "skip"), default="raise")
    parser.add_argument("--renew", action="store_true", help="replace shards of files as they were")
    parser.add_argument("--verify", action="store_true", help="only check the checksums of --out")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Prepares or verifies the splits that the options name; returns the exit status.

    Raises:
      UserError: no such data set or split, a broken example, or a shard that differs from its manifest.
    """
    if arguments.dataset.startswith(registry.TFDS):
        raise UserError(f"--dataset={arguments.dataset}: is in shards already, and read as it is")
    spec = registry.spec(arguments.dataset, arguments.root)
    if arguments.shard_examples < 1:
        raise UserError(f"--shard-examples={arguments.shard_examples}: must be at least 1")
    if arguments.workers < 0:
        raise UserError(f"--workers={arguments.workers}: must be at least 0 (in this process)")
    if not arguments.out.strip():
        raise UserError("--out: no folder given")

    # By default the two splits that training and evaluation use.
    for split in arguments.split or dict.fromkeys((spec.train_split, spec.eval_split)):
        if arguments.verify:
            if wrong := records.verify(arguments.out, split):
                raise UserError("; ".join(wrong))
            log.info("%s: every shard has its checksum", split)
            continue
        manifest = prepare_split(
            partial(registry.open_source, arguments.dataset, arguments.root, split),
            spec,
            split,
            arguments.out,
            shard_examples=arguments.shard_examples,
            workers=arguments.workers,
            on_error=arguments.on_error,
            renew=arguments.renew,
        )
        for line in manifest["broken"]:
            log.warning("left out: %s", line)
        log.info("%s: %d examples in %d shards", split, manifest["examples"], len(manifest["shards"]))
    return 0


def main() -> int:
    """Runs the command line; returns the exit status."""
    arguments = _parser().parse_args()
    setup()
    return run_tool(partial(run, arguments))


if __name__ == "__main__":
    sys.exit(main())
