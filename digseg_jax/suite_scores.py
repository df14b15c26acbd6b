# SPDX-License-Identifier: Apache-2.0
"""One data set of a suite, image by image: integer counts into a journal, scores out of it.

The metric is the data set's own (`DatasetSpec.metric`): confusion counts for label maps, TP/FP/FN at
every threshold for one foreground class, Dice of nested regions. Masks are brought to the label's
resolution as probabilities.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from digseg_jax.config import Config
from digseg_jax.data.registry import Source
from digseg_jax.data.spec import DatasetSpec
from digseg_jax.gating import Asker, Vocabulary, coarse_scorer
from digseg_jax.journal import Journal, pack, unpack
from digseg_jax.predictor import Predictor
from digseg_jax.segmentation import metrics, metrics_binary, metrics_boundary, open_vocab
from digseg_jax.segmentation.inference import EStep
from digseg_jax.segmentation.resolution import resize_probability
from digseg_jax.writers import Progress

THRESHOLD_IMAGES = 30  # of the training split, for the threshold of a foreground class
DEFAULT_THRESHOLD = 0.5


@dataclasses.dataclass(frozen=True)
class Job:
    """What all images of a data set have in common."""

    config: Config
    predictor: Predictor
    facts: DatasetSpec
    estep: EStep

    def masks(self, image: np.ndarray, index: int, classes: list[int], size: tuple[int, int]):
        """Probabilities [k, h, w] of some classes at the label's size."""
        answer = self.predictor.predict_masks(
            [image],
            [self.facts.prompt(self.facts.names[c]) for c in classes],
            ensemble=self.estep.ensemble,
            steps=self.estep.steps,
            spacing=self.estep.spacing,
            key=self.config.seed,
            mode=self.config.eval.inference,
            first=index,
        )[0]
        return resize_probability(answer, *size)


def score(job: Job, source: Source, train: Source | None, journal: Journal) -> dict[str, Any]:
    """The scores of a data set; whatever the journal has is not computed again.

    train: the training split, for the threshold search of a foreground metric; None leaves it out.
    """
    kind = job.facts.metric
    if kind == "foreground":
        return _foreground(job, source, train, journal)
    if kind == "region_dice":
        return _regions(job, source, journal)
    return _label_maps(job, source, journal)


def _images(job: Job, source: Source, journal: Journal, prefix: str) -> Iterator[tuple[int, Any]]:
    """Index and example of every image that the journal lacks; the others are not even read."""
    wanted = job.config.eval.num_images
    rows = range(len(source))
    if 0 < wanted < len(source):
        rows = [i * len(source) // wanted for i in range(wanted)]
    progress = Progress(len(rows), label=f"{job.facts.name} {job.estep}{prefix}", unit="images")
    started = time.monotonic()
    for done, i in enumerate(rows, start=1):
        if f"{prefix}{i}" not in journal:
            yield i, source[i]
        progress.update(done, done / max(time.monotonic() - started, 1e-9))
    progress.close()


def _rows(journal: Journal, prefix: str) -> list[Any]:
    keys = [k for k in journal.done if k.startswith(prefix) and k[len(prefix) :].isdigit()]
    return [journal[k] for k in sorted(keys, key=lambda k: int(k[len(prefix) :]))]


def _label_maps(job: Job, source: Source, journal: Journal) -> dict[str, Any]:
    """mIoU and its relatives under every protocol that is affordable."""
    settings, names = job.config.eval, job.facts.names
    prompts = tuple(job.facts.prompt(name) for name in names)
    asker = Asker(job.predictor, Vocabulary(prompts), job.estep, settings.inference, job.config.seed)
    palette = job.predictor.task.codec == "palette"
    exhaustive = palette or len(names) <= settings.exhaustive_limit
    scorer = None if palette else coarse_scorer(job.predictor, prompts, key=job.config.seed)
    for i, example in _images(job, source, journal, ""):
        image, label = example["image"], example["label"]
        found, row = {}, {}
        queries = {"exhaustive": len(names), "oracle": len(np.unique(label[label >= 0]))}
        if exhaustive:
            found["exhaustive"] = asker.exhaustive(image, i)
        if scorer is not None:
            found["oracle"] = asker.oracle(image, i, label)
            *found["gated"], scores = asker.gated(
                image, i, scorer, settings.gate_limit, settings.gate_cut
            )
            kept = open_vocab.survivors(scores, settings.gate_limit, settings.gate_cut)
            queries["gated"] = len(kept)
            row["scores"] = [float(s) for s in scores]
            row["areas"] = pack(np.bincount(label[label >= 0], minlength=len(names)))
        for protocol, (prediction, seconds) in found.items():
            counts = metrics.confusion(label[None], _fit(prediction, label)[None], len(names))
            asked = {"seconds": seconds, "queries": queries[protocol]}
            row[protocol] = {"counts": pack(np.asarray(counts)), **asked}
        main = _fit(found["exhaustive" if exhaustive else "gated"][0], label)
        row["boundary"] = pack(metrics_boundary.boundary_counts(label, main, len(names)))
        journal.add(str(i), row)
    return _label_map_scores(job, _rows(journal, ""))


def _fit(prediction: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Predictions are at the image's size, which is the label's by the reader's contract."""
    if prediction.shape != label.shape:
        raise ValueError(f"prediction {prediction.shape} and label {label.shape} differ in shape")
    return prediction


def _label_map_scores(job: Job, rows: list[Any]) -> dict[str, Any]:
    rule, protocols, per_class = job.facts.absent, {}, {}
    for protocol in open_vocab.PROTOCOLS:
        found = [row[protocol] for row in rows if protocol in row]
        if not found:
            continue
        counts = np.sum([unpack(r["counts"]) for r in found], axis=0)
        seconds = sum(r["seconds"] for r in found)
        protocols[protocol] = metrics.closed_set_scores(counts, rule) | {
            "images_per_second": len(found) / max(seconds, 1e-9),
            "queries_per_second": sum(r["queries"] for r in found) / max(seconds, 1e-9),
        }
        per_class[protocol] = metrics.iou_per_class(counts).tolist()
    headline = next((p for p in ("exhaustive", "gated") if p in protocols), None)
    result = {
        "metric": "miou",
        "absent_rule": rule,
        "protocols": protocols,
        "headline_protocol": headline,
        "miou": protocols[headline]["miou"] if headline else None,
        "boundary_iou": metrics_boundary.boundary_iou(
            np.sum([unpack(row["boundary"]) for row in rows], axis=0)
        ),
        "per_class": dict(zip(job.facts.names, per_class.get(headline, []), strict=False)),
    }
    if rows and "scores" in rows[0]:
        scores = np.array([row["scores"] for row in rows])
        areas = np.stack([unpack(row["areas"]) for row in rows])
        limits = open_vocab.recall_limits(job.facts.num_classes)
        result["gate_recall"] = open_vocab.gate_recall(scores, areas, limits)
    return result


def _foreground(job: Job, source: Source, train: Source | None, journal: Journal) -> dict[str, Any]:
    """IoU, precision, recall, F1 of the last class, at 0.5 and at a threshold found elsewhere."""
    target = job.facts.num_classes - 1
    parts = [("", source)] + ([("train", train)] if train is not None else [])
    for prefix, part in parts:
        if prefix:
            part = _first(part, THRESHOLD_IMAGES)
        for i, example in _images(job, part, journal, prefix):
            label = example["label"]
            start = time.monotonic()
            soft = job.masks(example["image"], i, [target], label.shape)[0]
            seconds = time.monotonic() - start
            truth = np.isin(label, job.facts.covers(target))
            counts = metrics_binary.threshold_counts(soft, truth, valid=label >= 0)
            journal.add(f"{prefix}{i}", {"counts": counts.tolist(), "seconds": seconds})
    rows = _rows(journal, "")
    counts = np.array([row["counts"] for row in rows])
    grid = list(metrics_binary.THRESHOLDS)
    plain = metrics_binary.foreground_scores(counts[:, grid.index(DEFAULT_THRESHOLD)])
    result = {"metric": "foreground", "threshold": DEFAULT_THRESHOLD, **plain}
    result["images_per_second"] = len(rows) / max(sum(row["seconds"] for row in rows), 1e-9)
    searching = _rows(journal, "train")
    if searching:
        found = metrics_binary.search_threshold(
            np.array([row["counts"] for row in searching]),
            job.facts.train_split,
            job.facts.eval_split,
        )
        searched = metrics_binary.foreground_scores(counts[:, grid.index(found)])
        result["searched"] = {"threshold": found, "split": job.facts.train_split, **searched}
    return result


def _first(source: Source, count: int) -> Any:
    return [source[i] for i in range(min(count, len(source)))]


def _regions(job: Job, source: Source, journal: Journal) -> dict[str, Any]:
    """REFUGE: the disc contains the cup; Dice of both per image, then their means."""
    outer, inner = _nested(job.facts)
    for i, example in _images(job, source, journal, ""):
        label = example["label"]
        start = time.monotonic()
        soft = job.masks(example["image"], i, [outer, inner], label.shape)
        seconds = time.monotonic() - start
        prediction = np.where(soft[1] > DEFAULT_THRESHOLD, inner, -1)
        prediction = np.where((prediction < 0) & (soft[0] > DEFAULT_THRESHOLD), outer, prediction)
        found = metrics_binary.cup_and_disc(label, prediction, cup=inner, rim=outer)
        journal.add(str(i), {**found, "seconds": seconds})
    rows = _rows(journal, "")
    means = metrics_binary.mean_scores(rows)
    seconds = means.pop("seconds", 0.0)
    return {
        "metric": "region_dice",
        **means,
        "images_per_second": 1.0 / seconds if seconds else None,
    }


def _nested(facts: DatasetSpec) -> tuple[int, int]:
    """The class that covers another one, and that other."""
    outer = next(c for c in range(facts.num_classes) if len(facts.covers(c)) > 1)
    inner = next(c for c in facts.covers(outer) if c != outer)
    return outer, inner
