# SPDX-License-Identifier: Apache-2.0
"""Which weights to start from when labels are few: short trainings from each, on parts of a domain.

The paper's premise is that a text-to-image model is the better start. A training sees some percent of
the labeled images of a domain; within a seed only the start differs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from digseg_jax.config.experiment import load_config
from digseg_jax.config.parse import to_dict
from digseg_jax.config.schema import Config
from digseg_jax.data.datasets.domains import DOMAINS, Domain
from digseg_jax.errors import UserError
from digseg_jax.evaluation.domains import domain_examples
from digseg_jax.evaluation.evaluator import Evaluator
from digseg_jax.io.json_file import read_json
from digseg_jax.io.storage import write_json
from digseg_jax.log import log
from digseg_jax.prediction.segmenter import Segmenter
from digseg_jax.runtime.sharding import make_mesh
from digseg_jax.training.loop import Trainer
from digseg_jax.training.setup import Setup
from digseg_jax.training.step import averaged
from digseg_jax.training.tasks.segmentation import SegmentationTask
from tests.bench.prior import ESTEP
from tests.bench.spread import deviation

# start -> what differs from the recipe of the domain's specialist
STARTS: dict[str, dict[str, Any]] = {
    "random": {"model.unet": "assets:prior", "model.unet_init": "random"},
    "prior": {"model.unet": "assets:prior"},
    "prior_slow": {"model.unet": "assets:prior", "optim.learning_rate": 3e-4},
    "segmenter": {"model.unet": "assets:segmenter"},
}
FOLDERS = tuple(domain.name for domain in DOMAINS if domain.reader == "folder")


def write_part(source: Path, target: Path, percent: int, seed: int) -> int:
    """Makes a folder with links to a part of a domain's training images, and to all of its val.

    The parts of a seed are nested: those of 5 % are among those of 10 %. Returns the number of images.

    Raises:
      UserError: the domain is not there.
    """
    pairs = {side: sorted((source / side / "train").glob("*")) for side in ("images", "masks")}
    if not pairs["images"] or len(pairs["images"]) != len(pairs["masks"]):
        raise UserError(f"{source}: no images/train with as many masks/train")
    order = np.random.default_rng(seed).permutation(len(pairs["images"]))
    kept = order[: max(1, round(len(order) * percent / 100))]

    for side, files in pairs.items():
        (target / side / "train").mkdir(parents=True)
        (target / side / "val").symlink_to((source / side / "val").absolute())
        for i in kept:
            (target / side / "train" / files[i].name).symlink_to(files[i].absolute())
    (target / "classes.txt").symlink_to((source / "classes.txt").absolute())
    return len(kept)


def configuration(domain: str, root: str, start: str, steps: int, seed: int) -> Config:
    """The specialist's recipe, shortened: crops with a query each, four of them a step."""
    short = {
        "data.root": root,
        "data.num_queries": 1,
        "train.batch_size": 4,
        "train.steps": steps,
        "optim.warmup_steps": steps // 10,
        "optim.cooldown_steps": steps // 4,
        "optim.ema_decay": 0.99,
        "seed": seed,
    }
    return load_config(f"generalist:{domain}", **short | STARTS[start])


def recipe(steps: int) -> str:
    """A digest of what the trainings of a journal have in common: any other setting changes it.

    It is of one domain and start, at a fixed root and seed, so it is the same for every run.
    """
    config = configuration(FOLDERS[0], "ROOT", "random", steps, 0)
    text = json.dumps(to_dict(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def one(domain: Domain, config: Config, images: int) -> float:
    """Trains in a scratch directory; mean IoU on val at 1x1, of the classes that are asked for."""
    task, mesh = SegmentationTask(config), make_mesh(config.mesh)
    with tempfile.TemporaryDirectory() as scratch:
        state = Trainer(Setup(config, task, mesh), scratch).run()
    segmenter = Segmenter(task, averaged(state), mesh=mesh).seen_at(domain.short_side)
    examples = domain_examples(domain, config.data.root, "val", images)
    scores = Evaluator(segmenter, examples, config.eval, seed=config.seed).scores(ESTEP)
    return float(scores.own_metric()["asked_miou"])


def run(
    root: str,
    journal: Path,
    only: Sequence[str],
    starts: Sequence[str],
    percents: Sequence[int],
    seeds: int,
    steps: int,
    images: int,
) -> dict[str, Any]:
    """Scores by domain, share of the labels and start.

    Args:
      root: folder of all domains.
      journal: file of the runs that have ended; a killed benchmark goes on after them.
      only: domains with a folder of their own.
      starts: keys of `STARTS`.
      percents: shares of the training images.
      seeds: 0 .. seeds - 1, of the share's choice and of the training.
      steps: of each training.
      images: of val, evenly spread; 0: all.

    Raises:
      UserError: no such domain or start, or a journal of other steps, images or settings.
    """
    _check("--only", only, FOLDERS)
    _check("--starts", starts, tuple(STARTS))
    facts = {"steps": steps, "images": images, "recipe": recipe(steps)}
    found: dict[str, Any] = read_json(journal) if journal.exists() else {"facts": facts, "runs": {}}
    if found["facts"] != facts:
        raise UserError(f"{journal}: of {json.dumps(found['facts'])}, not of {json.dumps(facts)}")

    # Seeds are the outermost loop: what a killed benchmark leaves is a table of fewer seeds.
    domains = {domain.name: domain for domain in DOMAINS}
    for seed in range(seeds):
        for name in only:
            for percent in percents:
                for start in starts:
                    key = f"{name} {percent} {start} {seed}"
                    if key in found["runs"]:
                        continue
                    with tempfile.TemporaryDirectory() as scratch:
                        write_part(Path(root, name), Path(scratch, name), percent, seed)
                        config = configuration(name, scratch, start, steps, seed)
                        found["runs"][key] = one(domains[name], config, images)
                    log.info("%s: %.3f", key, found["runs"][key])
                    write_json(journal, found)
    return facts | {"seeds": seeds, "estep": str(ESTEP), "runs": found["runs"]} | as_table(found)


def as_table(found: dict[str, Any]) -> dict[str, Any]:
    """Mean and deviation over the seeds: rows of domain and share, columns of starts.

    A report shows it, if the file lies in RUN/bench (`report.sections.bench_tables`).
    """
    cells: dict[tuple[str, int], dict[str, list[float]]] = {}
    for key, value in found["runs"].items():
        name, percent, start, _ = key.split()
        cells.setdefault((name, int(percent)), {}).setdefault(start, []).append(value)
    starts = [start for start in STARTS if any(start in row for row in cells.values())]
    columns = [text for start in starts for text in (start, "±")]
    rows = []
    for (name, percent), row in cells.items():
        values = [row.get(start, []) for start in starts]
        figures = [(statistics.fmean(v) if v else None, deviation(v)) for v in values]
        rows.append([name, f"{percent} %", *itertools.chain(*figures)])
    return {
        "title": f"Starts by share of the labels: {found['facts']['steps']} steps, {ESTEP}",
        "columns": ["domain", "labels", *columns],
        "rows": rows,
    }


def _check(flag: str, given: Sequence[str], legal: Sequence[str]) -> None:
    """Raises UserError for a value that is none of the legal ones."""
    if wrong := [value for value in given if value not in legal]:
        raise UserError(f"{flag}: {', '.join(wrong)} unknown; legal: {', '.join(legal)}")
