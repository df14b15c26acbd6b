# SPDX-License-Identifier: Apache-2.0
"""Time of a suite on two processes against one, each with a core of its own: the same counts."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from digseg_jax.errors import UserError
from digseg_jax.evaluation.suite import SUITES, check_suite
from tests import official_trees, pod


def run(weights: str, suite: str, images: int, sampling: str) -> dict[str, Any]:
    """Writes the suite's data sets in their official layouts, `images` each, and scores them twice.

    Times are those of whole commands. Both find their programs compiled, by a run before.
    """
    check_suite(suite)
    names = SUITES[suite] if suite in SUITES else [name for each in SUITES.values() for name in each]
    if lacking := sorted(set(names) - official_trees.EVALUATED.keys()):
        raise UserError(f"bench suite_on_two: no trees of {', '.join(lacking)}; take open_vocab")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise UserError("bench suite_on_two needs two CPU cores")

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in names:
            official_trees.repeated(folder / "data" / name, name, images)
        flags = [
            "--mode=eval",
            f"--model={weights}",
            f"--suite={suite}",
            f"--sampling={sampling}",
            f"--config.data.root={folder / 'data'}",
            f"--config.compute.compile_cache={folder / 'compiled'}",
        ]

        seconds, rows = {}, {}
        for count in (1, 2):
            first = [*flags, "--config.eval.num_images=1", f"--workdir={folder / f'first{count}'}"]
            pod.Pod(folder / f"first{count}.log", first, count, cores=cores).check()

            workdir, start = folder / f"run{count}", time.monotonic()
            command = [*flags, f"--workdir={workdir}"]
            pod.Pod(folder / f"run{count}.log", command, count, cores=cores).check()
            seconds[count] = time.monotonic() - start
            rows[count] = journal(workdir)

    if rows[1] != rows[2]:
        raise UserError("bench suite_on_two: two processes counted otherwise than one")
    return {
        "suite": suite,
        "weights": weights,
        "sampling": sampling,
        "images": images,
        "counted": len(rows[1]),
        "one_seconds": round(seconds[1], 1),
        "two_seconds": round(seconds[2], 1),
        "ratio": round(seconds[2] / seconds[1], 3),
    }


def journal(workdir: Path) -> dict[str, Any]:
    """All rows that a run counted, without their times; every row is there once."""
    found: dict[str, Any] = {}
    for path in sorted((workdir / "eval" / "journal").iterdir()):
        for row in map(json.loads, path.read_text().splitlines()[1:]):
            key = f"{path.name} {row['key']}"
            if key in found:
                raise UserError(f"{path}: {row['key']} twice")
            value = row["value"]  # counts of an image with its seconds, or those of a search without
            found[key] = {**value, "seconds": 0.0} if isinstance(value, dict) else value
    return found
