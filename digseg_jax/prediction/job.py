# SPDX-License-Identifier: Apache-2.0
"""The job of --mode=predict: segments any images by any queries, with shipped or trained weights."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from digseg_jax.arraytypes import UInt8
from digseg_jax.config.parse import to_dict, with_settings
from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import Config, EvalConfig
from digseg_jax.config.templates import PLACE
from digseg_jax.errors import UserError
from digseg_jax.io.files import UnreadableError, expanded_target, shown
from digseg_jax.io.georeference import INSTALL, has_rasterio, is_georeferenced
from digseg_jax.io.progress import Progress
from digseg_jax.io.raster import Raster
from digseg_jax.log import log
from digseg_jax.prediction.description import find_export, read_description
from digseg_jax.prediction.files import (
    find_images,
    find_queries,
    query_colors,
    read_rgb,
    vocabulary_template,
)
from digseg_jax.prediction.known_names import far_line, far_queries
from digseg_jax.prediction.labeling import labeling_file, write_labeling
from digseg_jax.prediction.pretrained import SHIPPED, PretrainedSegmenter, load_segmenter
from digseg_jax.prediction.raster import is_large, segment_raster, write_large
from digseg_jax.prediction.resume import identity_of, is_done, marks_of
from digseg_jax.prediction.targets import PredictionFiles, no_empty_folder, targets
from digseg_jax.runtime.compile_cache import use_own_compile_cache


def predict(
    config: Config | None,
    model: str | None,
    image: str | Sequence[str],
    queries: Sequence[str],
    out: Path,
    vocabulary: str | None = None,
    settings: Mapping[str, Any] | None = None,
    formats: Sequence[str] = (),
) -> None:
    """Segments every image that is named, and writes the files of `write_prediction` for each.

    In a folder, images are left out whose prediction is complete and would be the same again.

    Args:
      config: None takes every setting from the weights' own description.
      model: the weights, as `find_export` takes them; None: the shipped ones.
      image: files, folders or globs.
      queries, vocabulary: see `find_queries`.
      out: a folder, or a PNG for a single image.
      settings: values by key such as "eval.decoder", in place of the description's.
      formats: kinds of `labeling.KINDS`; the folder gets a file of each.

    Raises:
      UserError: unreadable images (the others are segmented first), empty query, missing weights,
        weights that were trained with another configuration, unwritable output.
    """
    # Check all input and output before the slow part: queries, images and file names.
    texts, out = find_queries(queries, vocabulary), expanded_target(out, "--out")
    images = find_images(image)
    with no_empty_folder(out):
        large = [path for path in images if is_large(path)]
        planned = targets(images, out, texts, _placed(images), large)
        labeled = {kind: labeling_file(kind, out, planned) for kind in formats}
        if len(images) == 1 and not large:
            read_rgb(images[0])  # an unreadable image is reported before the models are built

        # What is done already needs no weights.
        folder = find_export(model or SHIPPED)
        if config is None:
            config = read_description(folder).training_config(folder)
            config = with_settings(config, settings or {})
        use_own_compile_cache(config.compute.compile_cache)
        sampling, seed = config.eval, config.seed
        colors = query_colors(texts, read_description(folder).datasets, vocabulary)
        own = vocabulary_template(vocabulary)
        asked = [*map(to_dict, (config.model, config.diffusion, sampling)), seed]
        asked += [own] if own != PLACE else []  # the same words are then other prompts
        identity = identity_of(folder, asked, texts, colors.tolist())
        jobs, broken = _unfinished(images, planned, identity, resumes=out.suffix.lower() != ".png")
        if jobs:
            segmenter = load_segmenter(folder, config)
            _check_windows(segmenter, [path for path, _ in jobs if path in large])
            if far := far_queries(segmenter, texts):
                log.info("%s", far_line(far))
            task = _Task(segmenter, sampling, seed, texts, segmenter.asks_in(own), colors, identity)
            broken += _segment_files(task, jobs)

        # One file for a labeling tool, of all images whose masks are there.
        left_out = {*broken, *large}
        complete = [f for image, f in zip(images, planned, strict=True) if image not in left_out]
        for kind, path in labeled.items():
            write_labeling(kind, path, complete)
            left = f"; without the {len(large)} that are too large for annotations" if large else ""
            log.info("%d images -> %s%s", len(complete), shown(path), left)

    if broken:
        names = ", ".join(shown(path) for path in broken[:5])
        more = ", ..." if len(broken) > 5 else ""
        raise UserError(f"{len(broken)} of {len(images)} images could not be read: {names}{more}")


Job = tuple[Path, PredictionFiles]  # an image, and the files of its prediction


def _placed(images: Sequence[Path]) -> list[Path]:
    """The georeferenced images; without rasterio none, and a hint in the log."""
    placed = [image for image in images if is_georeferenced(image)]
    if placed and not has_rasterio():
        log.info("georeferenced images: %d; for georeferenced masks, %s", len(placed), INSTALL)
        return []
    return placed


def _unfinished(
    images: Sequence[Path], planned: Sequence[PredictionFiles], identity: str, *, resumes: bool
) -> tuple[list[Job], list[Path]]:
    """The images still to be segmented with their files, and those that cannot be read.

    resumes: leave out what is complete and would be the same, and say so.
    """
    # A file that cannot be read is found when it is compared with its finished prediction.
    jobs: list[Job] = []
    broken = []
    for image, files in zip(images, planned, strict=True):
        try:
            if not (resumes and is_done(files, image, identity)):
                jobs.append((image, files))
        except UnreadableError as error:
            broken.append(image)
            log.error("left out: %s", error)

    if done := len(images) - len(jobs) - len(broken):
        where = shown(planned[0].base.parent)
        log.info(
            "%d of %d images already have masks of this model and these settings, in %s; remove their "
            "files to make them again",
            done, len(images), where,
        )  # fmt: skip
    return jobs, broken


def _check_windows(segmenter: PretrainedSegmenter, large: Sequence[Path]) -> None:
    """Raises UserError for large rasters that the settings want to be seen whole."""
    if large and segmenter.mode != "window":
        raise UserError(
            f"config.eval.inference={segmenter.mode!r}: {shown(large[0])} is too large to be seen "
            "whole; legal: window"
        )


@dataclasses.dataclass(frozen=True)
class _Task:
    """What is asked of every image, and of which model.

    templates: see `Segmenter.asks_in`. identity: of the model and all settings; it is stored with each
    prediction.
    """

    segmenter: PretrainedSegmenter
    sampling: EvalConfig
    seed: int
    texts: Sequence[str]
    templates: Sequence[str]
    colors: UInt8[np.ndarray, "q 3"]
    identity: str


def _segment_files(task: _Task, jobs: Sequence[Job]) -> list[Path]:
    """Segments image files and writes the files of their predictions; returns the unreadable ones.

    One image after the other, so that memory holds one image's masks. A broken one among many costs
    only its own masks.
    """
    started, broken = time.monotonic(), []
    label = f"predict {task.sampling.ensemble}x{task.sampling.steps}"
    progress = Progress(len(jobs), label=label, unit="images")
    for done, (source, files) in enumerate(jobs, start=1):
        segment = _segment_large if files.large else _segment_file
        try:
            segment(task, source, files)
        except UnreadableError as error:
            broken.append(source)
            log.error("left out: %s", error)
        progress.update(done, done / (time.monotonic() - started))
    progress.close()
    return broken


def _segment_file(task: _Task, source: Path, files: PredictionFiles) -> None:
    """Segments an image file, writes the files of its prediction, and logs them.

    Raises:
      UnreadableError: the image cannot be read.
      UserError: a file cannot be written.
    """
    sampling = task.sampling
    with contextlib.closing(_ImageProgress(source)) as sampled:
        masks = task.segmenter(
            source, task.texts, sampling.ensemble, sampling.steps, task.seed,
            spacing=sampling.spacing, templates=task.templates, advance=sampled.update,
        )  # fmt: skip
        masks.colors = task.colors
        masks.facts |= marks_of(source, task.identity)

        # Large masks are computed only now, see `Masks`.
        with contextlib.closing(_ImageProgress(source, "masks", quiet=5.0)) as written:
            summary = masks.write(files, written.update)
    log.info("%s -> %s; also %s", shown(source), _coverage_line(summary), _beside(files))


def _segment_large(task: _Task, source: Path, files: PredictionFiles) -> None:
    """Does the same as `_segment_file` for a raster that is read by windows.

    Raises:
      UnreadableError: the raster cannot be read.
      UserError: a file cannot be written.
    """
    segmenter, sampling = task.segmenter, task.sampling
    estep = EStep(sampling.ensemble, sampling.steps, sampling.spacing)
    with Raster(source) as raster, contextlib.closing(_ImageProgress(source)) as sampled:
        height, width = raster.shape
        short = min(height, width)
        log.info(
            "%s: %d x %d pixels, read by windows; its short side is seen as %d pixels of %d "
            "(config.eval.short_side)",
            shown(source), width, height, min(segmenter.short_side or short, short), short,
        )  # fmt: skip
        bands = segment_raster(
            segmenter, raster, task.texts, estep, task.seed, sampled.update, templates=task.templates
        )
        facts = {
            "image": str(source), "estep": str(estep), "seed": task.seed,
            "templates": list(task.templates), **marks_of(source, task.identity),
        }  # fmt: skip
        summary = write_large(files, raster, task.texts, bands, facts, task.colors)
    log.info("%s -> %s; also %s", shown(source), _coverage_line(summary), shown(files.rasters[1]))


def _coverage_line(summary: Mapping[str, Any]) -> str:
    """The file of each query's mask, and the percentage of the image that it covers."""
    rows = summary["queries"]
    return ", ".join(f"{r['mask']} ({r['query']}, {100 * r['coverage']:.1f} %)" for r in rows)


def _beside(files: PredictionFiles) -> str:
    """The other files of a prediction, abbreviated as NAME{ENDING,...}."""
    ends = ["*.probability.png", ".overlay.png", ".labels.png", ".coco.json", ".npz", ".json"]
    ends += [path.name.removeprefix(files.base.name) for path in files.rasters]
    return f"{shown(files.base)}{{{','.join(ends)}}}"


class _ImageProgress:
    """Progress within one image; an image that takes a single step shows none.

    unit: what is counted. quiet: seconds without a line, for work that is mostly short.
    """

    def __init__(self, image: Path, unit: str = "steps", quiet: float = 0.0):
        self.image, self.unit, self.quiet = image, unit, quiet
        self.started = time.monotonic()
        self.progress: Progress | None = None

    def update(self, done: int, steps: int) -> None:
        """Shows that `done` of the image's `steps` are done."""
        seconds = time.monotonic() - self.started
        if steps == 1 or seconds < self.quiet:
            return

        # Made at the first call, which knows the number of steps.
        if self.progress is None:
            self.progress = Progress(steps, label=f"  {shown(self.image.name)}", unit=self.unit)
        self.progress.update(done, done / seconds)

    def close(self) -> None:
        """Ends the progress line, if there is one."""
        if self.progress is not None:
            self.progress.close()
