# SPDX-License-Identifier: Apache-2.0
"""What members and steps bring, by the timesteps and the noise schedule of training; on the land cover.

The paper's Table 4 has gains from members (+2.0 and +1.4 mIoU) and from a second step (+0.3). Here the
same fine-tuning of the prior runs with several schedules, and every run samples 8 members in one and in
two steps, once. Rows of fewer members are parts of these: 8 of one member, 2 of four, whose scores are
averaged. So every row has the same noise, and differences within a run have little luck in them. Masks
are read from the latents by the linear probe, with which members bring less than with the decoder.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from digseg_jax.config.parse import parse
from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import Config
from digseg_jax.data.datasets.landcover import TILE
from digseg_jax.errors import UserError
from digseg_jax.evaluation.evaluator import Evaluator
from digseg_jax.evaluation.examples import eval_examples
from digseg_jax.log import log
from digseg_jax.metrics import confusion
from digseg_jax.prediction.answer import Answer
from digseg_jax.prediction.request import Request
from digseg_jax.prediction.segmenter import Segmenter
from digseg_jax.recipes import land_cover
from digseg_jax.runtime.sharding import make_mesh
from digseg_jax.training.loop import Trainer
from digseg_jax.training.setup import Setup
from digseg_jax.training.step import averaged
from digseg_jax.training.tasks.segmentation import SegmentationTask
from tests.bench.spread import deviation

# Name -> what config.diffusion has beside the defaults. "leaky": Stable Diffusion's own schedule, which
# leaves some signal at the last timestep.
SCHEDULES: Mapping[str, Mapping[str, Any]] = {
    "high_noise": {},
    "high_noise, half at 999 and 499": {"sampler_share": 0.5},
    "uniform": {"timestep_sampling": "uniform"},
    "uniform, leaky": {"timestep_sampling": "uniform", "zero_snr": False},
}
MEMBERS, STEPS = 8, (1, 2)
PARTS = (1, 4, 8)  # members of a row
PRIOR = "assets:prior"


def configuration(schedule: str, seed: int, steps: int, weights: str = PRIOR) -> Config:
    """The quickstart's fine-tuning with one of `SCHEDULES`, from the prior or from trained weights.

    Trained weights get a lower learning rate, as a longer run of theirs would.

    Raises:
      UserError: no such schedule.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"--schedules: {schedule!r}; legal: {'; '.join(SCHEDULES)}")
    values = land_cover()
    values.seed, values.train.steps, values.optim.ema_decay = seed, steps, 0.99
    values.data.text_noise, values.data.word_dropout = 0.2, 0.5
    values.eval.view_size, values.eval.decoder = (TILE,), "probe"
    values.diffusion.update(SCHEDULES[schedule])
    if weights != PRIOR:
        values.model.unet = weights
        values.optim.learning_rate = 4e-4
    return parse(values)


def one(config: Config, images: int) -> dict[str, dict[str, float]]:
    """Trains in a scratch directory; mIoU and accuracy on test of each row, uncalibrated.

    images: of test, evenly spread; 0 for all.
    """
    task, mesh = SegmentationTask(config), make_mesh(config.mesh)
    with tempfile.TemporaryDirectory() as scratch:
        state = Trainer(Setup(config, task, mesh), scratch).run()
    segmenter = Segmenter(task, averaged(state), config.eval, mesh=mesh)
    examples = eval_examples(config.data, "test", images)
    evaluator = Evaluator(segmenter, examples, config.eval, seed=config.seed)

    # Counts of every part of the members, over all images.
    classes = len(examples.classes)
    counts: dict[str, list[np.ndarray]] = {}
    for index in range(len(examples)):
        example = examples[index]
        request = Request(example["image"], index, evaluator.queries, None, evaluator.templates)
        for steps in STEPS:
            (answer,) = segmenter.segment(
                [request], EStep(MEMBERS, steps), key=config.seed, mode=evaluator.mode, evidence=True
            )
            for size, labels in label_maps(answer):
                found = [confusion.confusion(example["label"], one, classes) for one in labels]
                name = f"{size}x{steps}"
                before = counts.get(name, [np.zeros_like(found[0])] * len(found))
                counts[name] = [a + b for a, b in zip(before, found, strict=True)]

    # A row's score is the mean over its parts.
    return {
        name: {
            "miou": float(np.mean([confusion.mean_iou(part) for part in parts])),
            "accuracy": float(np.mean([confusion.pixel_accuracy(part) for part in parts])),
        }
        for name, parts in counts.items()
    }


def label_maps(answer: Answer) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Label maps [h, w] of the answer's members by parts of each size in `PARTS`.

    Yields:
      A number of members, and the label map of every part with so many.
    """
    evidence = np.stack([answer.evidence(q) for q in range(answer.num_queries)])  # [q, e, h, w]
    probability = 1.0 / (1.0 + np.exp(-answer.scale * evidence))
    for size in PARTS:
        firsts = range(0, probability.shape[1], size)
        parts = [probability[:, first : first + size].mean(axis=1) for first in firsts]
        yield size, [part.argmax(axis=0) for part in parts]


def run(
    seeds: range,
    steps: int,
    images: int,
    schedules: tuple[str, ...] = tuple(SCHEDULES),
    weights: str = PRIOR,
) -> dict[str, Any]:
    """Every schedule with every seed; within a seed only the schedule differs."""
    runs: dict[str, list[dict[str, dict[str, float]]]] = {}
    for seed in seeds:
        for schedule in schedules:
            found = one(configuration(schedule, seed, steps, weights), images)
            runs.setdefault(schedule, []).append(found)
            log.info("seed %d, %s: %s", seed, schedule, found)
    result = {
        "weights": weights, "steps": steps, "seeds": list(seeds), "images": images, "runs": runs
    }  # fmt: skip
    return result | as_table(result)


def as_table(result: dict[str, Any]) -> dict[str, Any]:
    """What a report shows of it, if the file lies in RUN/bench (`report.sections.bench_tables`)."""
    rows = []
    names = [f"{size}x{steps}" for steps in STEPS for size in PARTS]
    for schedule, found in result["runs"].items():
        miou = {name: np.array([one[name]["miou"] for one in found]) for name in names}
        means = [float(miou[name].mean()) for name in names]
        gains = [miou["8x2"] - miou[less] for less in ("1x2", "8x1", "1x1")]
        spreads = [(float(gain.mean()), deviation(gain)) for gain in gains]
        rows.append([schedule, *means, deviation(miou["8x2"]), *itertools.chain(*spreads)])
    return {
        "title": f"What members and steps bring: {result['steps']} steps from {result['weights']}, "
        f"{len(result['seeds'])} seeds, uncalibrated, read by the probe",
        "columns": [
            "training", *names, "± of 8x2", "8x2 - 1x2", "±", "8x2 - 8x1", "±", "8x2 - 1x1", "±"
        ],
        "rows": rows,
    }  # fmt: skip
