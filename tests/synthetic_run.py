# SPDX-License-Identifier: Apache-2.0
"""A made-up run directory that looks like a real one, for the tests of the report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from digseg_jax.viz.gallery import GalleryItem, write_gallery

CLASSES = (
    "water", "forest", "shrub and grass", "cropland", "wetland", "urban", "snow and ice", "barren",
)  # fmt: skip
_PHOTO = np.array(
    [[16, 38, 74], [34, 62, 32], [104, 112, 62], [142, 132, 82], [58, 82, 66], [128, 122, 120],
     [226, 232, 238], [176, 146, 104]]
)  # fmt: skip


def dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _terrain(rng: np.random.Generator, size: int, rough: float = 1.9) -> np.ndarray:
    """Fractal noise in 0..1: white noise with a power-law spectrum."""
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]
    falloff = np.hypot(fy, fx)
    falloff[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.normal(size=(size, size))) * falloff**-rough
    noise = np.fft.irfft2(spectrum, (size, size))
    return (noise.argsort(axis=None).argsort().reshape(size, size) + 0.5) / size**2


def _iou(a: np.ndarray, b: np.ndarray) -> float | None:
    either = (a | b).sum()
    return float((a & b).sum() / either) if either else None


def make_item(seed: int, size: int = 128) -> GalleryItem:
    """A tile: a photo, its land cover, a worse prediction, and the soft mask of each query."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(8)[: rng.integers(3, 6)]
    edges = np.sort(rng.uniform(0.15, 0.85, len(order) - 1))
    height = _terrain(rng, size)
    label = order[np.digitize(height, edges)].astype(np.int32)
    light = 1 + 0.5 * (_terrain(rng, size, 1.2) - 0.5)
    image = np.clip(_PHOTO[label] * light[..., None] + rng.normal(0, 4, (size, size, 3)), 0, 255)
    blurred = height + 0.16 * (_terrain(rng, size, 1.7) - 0.5)
    coarse = blurred.reshape(size // 4, 4, size // 4, 4).mean((1, 3)).repeat(4, 0).repeat(4, 1)
    prediction = order[np.digitize(coarse, edges)].astype(np.int32)
    soft = np.stack([1 / (1 + np.exp(-9 * ((prediction == c) - 0.5 + 0.5 * (light - 1))))
                     for c in range(8)])  # fmt: skip
    label[:5, -18:] = -1
    ious = [_iou((prediction == c) & (label >= 0), label == c) for c in range(8)]
    return GalleryItem(f"tile r{seed:02d} c{7 + seed}", image.astype(np.uint8), label, prediction,
                       soft, CLASSES, ious)  # fmt: skip


def weights(**changes: Any) -> dict[str, Any]:
    """What the product says of a run's weights, see `Description.provenance`."""
    return {
        "parameters": 6_049_124, "datasets": ["landcover"], "steps": 4000,
        "checkpoint": "checkpoints/4000", "started_from": "assets:prior", "seed": 0,
        "parts": {"vae": "0" * 64, "text": "1" * 64},
        "versions": {"digseg_jax": "0.1.0", "jax": "0.10.0"}, **changes,
    }  # fmt: skip


def results(**changes: Any) -> dict[str, Any]:
    scores = (0.9127, 0.6883, 0.5121, 0.4378, 0.1832, 0.2043, 0.8410, None)
    return {
        "dataset": "landcover", "split": "held-out", "protocol": "exhaustive", "num_images": 64,
        "miou": 0.53991428, "accuracy": 0.83462,
        "per_class": dict(zip(CLASSES, scores, strict=True)),
        "ensemble": 4, "steps": 2, "seed": 0, "queries": list(CLASSES), "absent_rate": 0.02134,
        "matching_iou": 0.5604, "wrong_query_iou": 0.0712, "weights": weights(),
        "confusion": confusion(), **changes,
    }  # fmt: skip


def confusion() -> list[list[int]]:
    """Pixels by true and predicted class; urban is taken for cropland, and nothing shows class 7."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 90, (8, 9)) + 1000 * np.eye(8, 9, dtype=int)
    counts[5, 3], counts[7] = 700, 0
    return counts.tolist()


def metrics(count: int = 400) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(1, count + 1):
        loss = (0.02 + 0.9 * np.exp(-i / 25) + 0.12 / (1 + i / 40)) * np.exp(rng.normal(0, 0.18))
        row = {"step": 10 * i, "loss": float(loss), "images_per_second": 38.2}
        if i % 50 == 0:
            row["val_miou"] = 0.55 * (1 - float(np.exp(-i / 130)))
        rows.append(row)
    return rows


def suite_results() -> dict[str, Any]:
    """One data set under three protocols, one that was not there."""
    protocols = {
        name: {"miou": miou, "images_per_second": speed, "queries_per_second": 9 * speed}
        for name, miou, speed in (
            ("oracle", 0.41, 1.5), ("gated", 0.302, 1.2), ("exhaustive", 0.31, 0.11)
        )
    }  # fmt: skip
    row = {
        "suite": "open_vocab", "dataset": "ade20k", "estep": "8x2", "metric": "miou",
        "protocols": protocols, "headline_protocol": "exhaustive", "miou": 0.31,
        "boundary_iou": 0.2, "per_class": {f"class {i}": i / 60 for i in range(50)} | {"none": None},
        "gate_recall": {"1": {"pixels": 0.4, "classes": 0.2}, "16": {"pixels": 0.98, "classes": 0.9}},
        "templates": ["a photo of a {}"], "inference": "whole", "view_size": [512, 512],
        "short_side": 0,
    }  # fmt: skip
    missing = {"suite": "open_vocab", "dataset": "cityscapes", "estep": "8x2", "missing": "no folder"}
    return {"suite": "open_vocab", "seed": 0, "rows": [row, missing]}


def make_run(workdir: Path, images: int = 6) -> Path:
    """Every file that the report reads."""
    dump(workdir / "eval" / "results.json", results())
    lines = "".join(json.dumps(row) + "\n" for row in metrics())
    (workdir / "metrics.jsonl").write_text(lines, encoding="utf-8")
    kinds = ["", "worst", "best", "typical"]
    items = [dataclasses.replace(make_item(i), kind=kinds[i % 4]) for i in range(images)]
    dump(workdir / "eval" / "speed.json", {
        "images_per_second": 1.25, "queries_per_second": 10.0, "date": "2026-01-02 03:04+00:00",
        "devices": "4 x TPU v5 lite", "processes": 1, "versions": {"jax": "0.10.0"},
        "command": "digseg --config=quickstart --workdir=runs/quickstart",
    })  # fmt: skip
    write_gallery(workdir / "eval" / "gallery", items, CLASSES)
    rows = [(1, 1, "trailing", 0.4712, 96.4), (1, 2, "trailing", 0.5034, 49.1),
            (4, 2, "trailing", 0.5399, 12.6), (8, 2, "trailing", 0.5431, 6.32),
            (1, 1, "leading", 0.0613, 96.1), (4, 2, "leading", 0.3120, 12.5)]  # fmt: skip
    names = ("ensemble", "steps", "spacing", "miou", "queries_per_second")
    dump(workdir / "eval" / "estep.json", {
        "rows": [dict(zip(names, row, strict=True)) for row in rows],
        "note": "Measured by this run on the held-out split of landcover.",
    })  # fmt: skip
    dump(workdir / "bench" / "landcover.json", {
        "title": "Against gradient-boosted trees on the same tiles",
        "columns": ["method", "mIoU", "accuracy", "images"],
        "rows": [["this run", 0.5399, 0.8346, 64], ["trees", 0.5117, 0.8702, 64]],
        "note": "Trees see color and means over 9 and 41 pixels.",
    })  # fmt: skip
    dump(workdir / "eval" / "suite_open_vocab.json", suite_results())
    dump(workdir / "config.json", {"seed": 0, "train": {"steps": 4000, "batch_size": 8}})
    return workdir
