# SPDX-License-Identifier: Apache-2.0
"""One image, some queries, mask pictures: any image size, with the shipped or a run's weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, UnidentifiedImageError

from digseg_jax import assets
from digseg_jax.config import Config
from digseg_jax.errors import UserError
from digseg_jax.log import log
from digseg_jax.report import pictures
from digseg_jax.segmentation import inference
from digseg_jax.segmentation.inference import EStep
from digseg_jax.tasks.segmentation import SegmentationTask
from digseg_jax.weights import load_params
from digseg_jax.workdir import EXPORT

SHIPPED = "assets:segmenter"
WINDOW_BATCH = 4


def predict(
    config: Config, workdir: str | None, image_path: Path, queries: Sequence[str], out: Path
) -> None:
    """Writes OUT (0 or 255; one file a query), OUT's name + .overlay.png and .probability.png.

    Raises:
      UserError: unreadable image, empty query, missing weights, unwritable output.
    """
    for query in queries:
        if not query.strip():
            raise UserError("--query: empty; name what to segment, such as --query='snow and ice'")
    image = read_image(image_path)
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: no such directory {out.parent}")
    if out.is_dir() or out.suffix.lower() != ".png":
        raise UserError(f"--out={out}: must be the name of a file that ends in .png")
    folder = Path(workdir) / EXPORT if workdir else Path(assets.resolve(SHIPPED))
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no trained weights here; run --mode=train first")
    # the architecture comes with the weights; nothing of the prior is needed
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, unet=str(folder)))
    task = SegmentationTask(config, prompts=queries)
    params = load_params(folder, task.abstract)
    scale = _scale(folder)
    estep = EStep(config.eval.ensemble, config.eval.steps, config.eval.spacing)
    probability = segment(config, task, params, image, queries, estep, scale)
    for query, mask in zip(queries, probability, strict=True):
        path = out if len(queries) == 1 else out.with_stem(f"{out.stem}_{_slug(query)}")
        _write(path, image, mask)
        log.info("%r covers %.1f %% of %s: %s", query, 100 * (mask > 0.5).mean(), image_path, path)


def read_image(path: Path) -> np.ndarray:
    """RGB uint8 [h, w, 3] of any file Pillow reads; transparency is laid over white, EXIF applied.

    Raises:
      UserError: missing or unreadable file.
    """
    from PIL import ImageOps

    if not path.is_file():
        raise UserError(f"--image={path}: no such file")
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode in ("I", "F") or image.mode.startswith("I;16"):
                values = np.asarray(image, np.float64)
                span = max(values.max() - values.min(), 1e-9)
                image = Image.fromarray(((values - values.min()) * 255 / span).astype(np.uint8))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                ground = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(ground, image)
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError, ValueError) as error:
        raise UserError(f"--image={path}: not a readable image ({error})") from error


def segment(
    config: Config,
    task: SegmentationTask,
    params: dict,
    image: np.ndarray,
    queries: Sequence[str],
    estep: EStep,
    scale: float,
) -> np.ndarray:
    """Probabilities [q, h, w]: overlapping windows of the training size, blended by a soft weight."""
    size = config.data.image_size
    height, width = image.shape[:2]
    pad = [(0, max(size - height, 0)), (0, max(size - width, 0)), (0, 0)]
    padded = np.pad(image, pad, mode="symmetric" if min(height, width) > 1 else "edge")
    corners = [
        (t, le) for t in starts(padded.shape[0], size) for le in starts(padded.shape[1], size)
    ]
    run = _compiled(task, estep, scale)
    weight = _window_weight(size)
    total = np.zeros((len(queries), *padded.shape[:2]), np.float64)
    weights = np.zeros(padded.shape[:2], np.float64)
    for first in range(0, len(corners), WINDOW_BATCH):
        group = corners[first : first + WINDOW_BATCH]
        full = group + [group[-1]] * (WINDOW_BATCH - len(group) if len(corners) > 1 else 0)
        crops = np.stack([padded[t : t + size, le : le + size] for t, le in full])
        index = np.arange(first, first + len(full), dtype=np.int32)
        for (t, le), p in zip(
            group, np.asarray(run(params, task.frozen, crops, index)), strict=False
        ):
            total[:, t : t + size, le : le + size] += p * weight
            weights[t : t + size, le : le + size] += weight
    return (total / weights)[:, :height, :width]


def starts(length: int, size: int) -> list[int]:
    """Window starts that cover `length` evenly, at most three quarters of a window apart."""
    count = 1 + int(np.ceil(max(length - size, 0) / (0.75 * size)))
    return [int(s) for s in np.linspace(0, length - size, count).round()]


def _compiled(task: SegmentationTask, estep: EStep, scale: float):
    @jax.jit
    def run(params: dict, frozen: dict, images: jax.Array, index: jax.Array) -> jax.Array:
        evidence = task.evidence(params, frozen, images, index, estep)
        return inference.probabilities(evidence, scale, jnp.zeros(evidence.shape[1]))

    return run


def _window_weight(size: int) -> np.ndarray:
    """Highest in the middle, small but positive at the border: [size, size]."""
    ramp = np.minimum(np.arange(1, size + 1), np.arange(size, 0, -1)) / (size / 2)
    return np.clip(np.outer(ramp, ramp), 1e-3, None)


def _scale(folder: Path) -> float:
    path = folder / "calibration.json"
    return float(json.loads(path.read_text())["scale"]) if path.is_file() else 2.0


def _write(path: Path, image: np.ndarray, probability: np.ndarray) -> None:
    mask = probability > 0.5
    try:
        Image.fromarray(mask.astype(np.uint8) * 255).save(path)
        pictures.save_mask(path.with_suffix(".probability.png"), probability)
        colors = np.array([[230, 60, 30]], np.uint8)
        painted = pictures.overlay(image, np.where(mask, 0, -1).astype(np.int32), colors, alpha=0.5)
        pictures.save_photo(path.with_suffix(".overlay.png"), painted)
    except (OSError, ValueError) as error:
        raise UserError(f"--out={path}: cannot be written ({error})") from error


def _slug(query: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in query.strip().lower())
