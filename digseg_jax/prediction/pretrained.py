# SPDX-License-Identifier: Apache-2.0
"""Segmenters of exported weights: the way from a folder, a bucket or the hub to masks."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from digseg_jax import assets
from digseg_jax.arraytypes import Float, UInt8
from digseg_jax.config.parse import to_dict
from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import Config
from digseg_jax.config.templates import check_template
from digseg_jax.errors import UserError
from digseg_jax.io.files import UnreadableError
from digseg_jax.io.image_file import MAX_PIXELS
from digseg_jax.io.storage import AnyPath, as_path, filled_locally
from digseg_jax.io.workdir import CALIBRATION
from digseg_jax.log import log
from digseg_jax.prediction.answer import Answer, GroupedAnswer, Planes, ViewMasks
from digseg_jax.prediction.description import (
    Description,
    check_agreement,
    find_export,
    read_description,
    unet_folder,
)
from digseg_jax.prediction.export import copy_export, push_export
from digseg_jax.prediction.files import check_order, check_queries, pixels_of, query_colors
from digseg_jax.prediction.masks import Masks
from digseg_jax.prediction.progress import Watch
from digseg_jax.prediction.request import Request, filled
from digseg_jax.prediction.segmenter import Segmenter
from digseg_jax.runtime.distributed import together
from digseg_jax.runtime.interrupts import check_interrupts
from digseg_jax.runtime.sharding import make_mesh
from digseg_jax.segmentation.calibration import stored_scale
from digseg_jax.segmentation.resize import scaled_shape
from digseg_jax.segmentation.views import count_views
from digseg_jax.training.mesh_choice import choose_mesh, needs_of
from digseg_jax.training.tasks.parts import choose_kernels, load_parts
from digseg_jax.training.tasks.segmentation import SegmentationTask
from digseg_jax.weights import load_params
from digseg_jax.weights.safetensors_io import PIPELINE_FILE
from digseg_jax.weights.upload import check_target

SHIPPED = "assets:generalist"
HELD = 2**31  # bytes of decoded masks that are kept at a time


def load_segmenter(
    model: str | os.PathLike = SHIPPED, config: Config | None = None
) -> PretrainedSegmenter:
    """Loads exported weights onto all devices; every process must call it.

    Args:
        model: a run's working directory or its export, on a disk or on gs://, assets:NAME for weights
            that ship with the package, or a hub id such as org/name.
        config: None takes every setting from the weights' own description.

    Raises:
        UserError: there are no such weights, or they were trained with another configuration.

    Example:
        >>> segment = dj.load_segmenter("assets:segmenter")
        >>> segment(image, "water", ensemble=1, steps=1).label.dtype
        dtype('int32')
    """
    # Settle the configuration before anything is built: a contradiction to the training is an error.
    folder = find_export(os.fspath(model))
    description = read_description(folder)
    if config is None:
        config = description.training_config(folder)
    check_agreement(description, to_dict(config), folder)
    parts = description.with_pinned_parts(config.model, folder)

    # Weights with terms of their own say so before they are used.
    if terms := assets.terms_of(folder):
        log.info("%s: %s", folder.name, terms)

    # The architecture comes with the weights, so the checkpoint they started from is not needed.
    unet = str(unet_folder(folder))
    model_config = dataclasses.replace(parts, unet=unet)
    kernels = choose_kernels(config.compute, jax.devices(), parts.dtype, config.mesh.tensor)
    config = dataclasses.replace(config, model=model_config, compute=kernels)

    # The prompt bank stays empty, as the segmenter encodes its own queries. The classes are the
    # description's: the data set may not be on this machine.
    with together("the weights"):
        classes = len(description.classes)
        loaded = load_parts(
            config.data, config.model, kernels, config.loss, prompts=(), classes=classes
        )
        task = SegmentationTask(config, loaded)
        task.adopt(folder)
    check_interrupts()
    return PretrainedSegmenter(task, folder, description)


class PretrainedSegmenter(Segmenter):
    """A segmenter of exported weights, public as `digseg_jax.Segmenter`.

    Attributes:
        folder: the weights, on this machine.
        description: their origin, and the settings of their training.

    Example:
        >>> segment = dj.load_segmenter()
        >>> segment(image, ["water", "forest"], ensemble=2, steps=1, seed=3).queries
        ('water', 'forest')
    """

    def __init__(self, task: SegmentationTask, folder: Path, description: Description):
        # Scale of the evidence: the codec's own, or fitted by an evaluation, else the default.
        calibration, scale = folder / CALIBRATION, 2.0
        if task.codec.scale is None and calibration.is_file():
            scale = stored_scale(calibration)

        # Queries are asked in the templates that the weights were trained with.
        config = task.config
        images = config.train.batch_size / (config.compute.accumulation or 1)
        needs = partial(needs_of, task, config.optim, images)
        mesh = make_mesh(choose_mesh(config.mesh, needs, jax.devices()))
        params, words = load_params(unet_folder(folder), task.abstract), description.templates
        super().__init__(task, params, mesh=mesh, scale=scale, templates=words)
        self.folder, self.description = folder, description

    def __call__(
        self,
        image: str | os.PathLike | Image.Image | UInt8[np.ndarray, "h w 3"],
        queries: str | Sequence[str],
        ensemble: int = 8,
        steps: int = 2,
        seed: int = 0,
        *,
        spacing: str = "trailing",
        index: int = 0,
        templates: str | Sequence[str] = (),
        advance: Callable[[int, int], None] | None = None,
        watch: Watch | None = None,
    ) -> Masks:
        """Segments an image of any size by words.

        Args:
            image: a file, a Pillow image, or uint8 [H, W, 3].
            queries: words to look for, one or several. A palette answers all of its classes, which
                must be named in their order.
            ensemble, steps: members and sampling steps of each; the paper's are 8 and 2.
            seed: seed of the members' noise: the same seed gives the same masks.
            spacing: spacing of the timesteps, "trailing" or "leading".
            index: identifies the image in the draws of the noise; an evaluation gives its i-th image i.
            templates: prompts with {} for the query; by default the first of the training's, or "{}",
                the bare query, if it is one of them. The probabilities of several are averaged.
            advance: called after every call of the network, with the calls done and their total.
            watch: called after every step of every member (see `prediction.progress`). Masks of more
                than `HELD` bytes are made without.

        Raises:
            UserError: an unreadable or too thin image, a blank or too long query, an illegal template,
                or a number below 1.
        """
        # Bad arguments are reported before the network runs.
        texts = (queries,) if isinstance(queries, str) else tuple(queries)
        check_queries(texts, "queries")
        if self.codec.closed:
            check_order(texts, self.description.classes)
        timesteps = self.task.schedule.num_timesteps
        if ensemble < 1 or not 1 <= steps <= timesteps or spacing not in ("trailing", "leading"):
            raise UserError(
                f"ensemble={ensemble}, steps={steps}, spacing={spacing!r}: legal are members from 1, "
                f"steps from 1 to {timesteps}, trailing or leading"
            )

        # An illegal template is one line; a closed codec takes none.
        words = (templates,) if isinstance(templates, str) else tuple(templates)
        words = self.asks_in(wanted=[check_template(word, "templates") for word in words])

        pixels, sampling = pixels_of(image), EStep(ensemble, steps, spacing)
        self._check_length(pixels.shape[0], pixels.shape[1])
        request = Request(pixels, index, texts, templates=words)
        answer = self._answer(request, sampling, seed, advance, watch)

        # What it takes to make the same masks again, for NAME.json.
        facts = {"estep": str(sampling), "seed": seed, "templates": list(words)}
        if isinstance(image, (str, os.PathLike)):
            facts = {"image": os.fspath(image)} | facts
        return Masks(pixels, texts, answer, facts, query_colors(texts, self.description.datasets))

    def _check_length(self, height: int, width: int) -> None:
        """Raises UnreadableError for a strip so thin that it would be enlarged beyond the memory."""
        if self.mode != "window" or not self.short_side:
            return
        seen = scaled_shape((height, width), self.short_side)
        if seen[0] * seen[1] > MAX_PIXELS:
            raise UnreadableError(
                f"an image of {width} x {height} pixels would be seen as {seen[1]} x {seen[0]} "
                f"(config.eval.short_side={self.short_side}), {MAX_PIXELS} pixels at most; cut it"
            )

    def _answer(
        self,
        request: Request,
        sampling: EStep,
        seed: int,
        advance: Callable[[int, int], None] | None,
        watch: Watch | None,
    ) -> Planes:
        """Masks of an image: all at once, or one group of queries at a time above `HELD` bytes.

        The programs, and so the masks, are the same either way. If each query has a mask image of its
        own, a group is sampled when it is asked for. If a mask image shows several queries, it is
        sampled once and read again for every group.
        """
        count, ways = len(request.queries), self.ways(request)
        slots = self.codec.slots(count * ways)
        options: dict[str, Any] = {"key": seed, "mode": self.mode}

        # float32 planes of all views and texts of a query. Masks that the probe reads are small.
        views = count_views(request.image.shape[:2], self.size, self.mode, self.short_side)
        each = 4 * views * math.prod(self.size) * ways
        apart = self.decodes_all(count * ways, slots, self.settings.decoder)
        if each * count < HELD or not apart:
            (answer,) = self.segment([request], sampling, advance=advance, watch=watch, **options)
            return answer

        def told(part: int, parts: int) -> Callable[[int, int], None]:
            """Wraps `advance`: the steps of one part are reported as steps of the whole."""

            def tell(done: int, total: int) -> None:
                """Reports `done` of a part's `total` steps."""
                if advance:
                    advance(part * total + done, parts * total)

            return tell

        # Several queries share a mask image: sample now, read groups later. The sampling itself is the
        # first of the parts that progress is counted in.
        if not self.codec.one_by_one:
            size = max(1, HELD // each)
            parts = 1 + -(-count // size)
            (drawn,) = self.segment([request], sampling, later=True, advance=told(0, parts), **options)

            def read(first: int) -> Answer:
                """Masks of the group that begins with query `first`."""
                return self._read_later(drawn, first, size, told(1 + first // size, parts))

            return GroupedAnswer(read, count, size)

        # One query per mask image: a group fills one call, each query with all of its texts.
        group = max(1, slots // ways)

        def ask(first: int) -> Answer:
            """Samples and decodes the group that begins with query `first`."""
            part = dataclasses.replace(request, queries=request.queries[first : first + group])
            tell = told(first // group, -(-count // group))
            (answer,) = self.segment([part], sampling, slots=slots, advance=tell, **options)
            return answer

        return GroupedAnswer(ask, count, group)

    def _read_later(
        self,
        answer: Answer,
        first: int,
        count: int,
        advance: Callable[[int, int], None] | None = None,
    ) -> Answer:
        """Reads masks of `count` queries, from index `first` on, of an answer that was only sampled.

        Every process must call it. The queries of a call are read together, as `segment` reads them,
        and the wanted ones are kept. advance: counts as many steps as that of `segment`.
        """
        # As many calls as the process with the most views needs.
        rows = self.views_of_call // self.programs.parts
        calls = self.programs.agree_on_largest(-(-len(answer.masks) // rows))[0]
        bias = answer.bias[first : first + count]
        latents = [masks.latents for masks in answer.masks if masks.latents is not None]  # every view's

        kept: list[ViewMasks] = []
        for call in range(calls):
            # Padding repeats a view, as in `segment`.
            part = latents[call * rows : (call + 1) * rows]
            filled = np.stack([*part, *[latents[-1]] * (rows - len(part))])
            found = self._read_groups(filled, answer, first, len(bias))

            # Copy each row: a slice would keep the masks of all queries in memory.
            for row in range(len(part)):
                arrays = {name: array[row].copy() for name, array in found.items()}
                kept.append(ViewMasks(np.arange(len(bias)), **arrays))
            if advance:
                groups = len(latents[0])
                advance((call + 1) * groups, calls * groups)
        return dataclasses.replace(answer, masks=tuple(kept), bias=bias)

    def _read_groups(
        self, latents: Float[np.ndarray, "n g k e h w c"], answer: Answer, first: int, count: int
    ) -> dict[str, np.ndarray]:
        """Masks [n, count, ...] of one call's views, read from the groups that hold the queries."""
        # Groups of `slots` queries were sampled together; the wanted range may span several.
        slots = self.codec.slots(answer.num_queries)
        groups = range(first // slots, -(-(first + count) // slots))

        # Read whole groups with their biases.
        parts = []
        for group in groups:
            own = filled(answer.bias[group * slots : (group + 1) * slots], slots)
            bias = np.broadcast_to(own, (len(latents), slots))
            parts.append(self.read(latents[:, group], bias, answer.scale, biased=answer.biased))

        # Cut the wanted queries out of the groups.
        start = first - groups[0] * slots
        return {
            name: np.concatenate([part[name] for part in parts], axis=1)[:, start : start + count]
            for name in parts[0]
        }

    @property
    def mode(self) -> str:
        """Way of cutting an image into views (see `digseg_jax.segmentation.views`)."""
        # "auto" follows the data set's convention, and an image by itself has no data set.
        chosen_mode = self.settings.inference
        return "window" if chosen_mode == "auto" else chosen_mode

    def save_pretrained(self, folder: str | os.PathLike) -> AnyPath:
        """Writes a whole pipeline to a folder on a disk or on gs://; returns the folder.

        `load_segmenter` reads it, and so does torch's
        `DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)`.

        Raises:
          UserError: the disk or the bucket cannot be written.
        """
        target = as_path(folder)
        with filled_locally(target) as local:
            copy_export(self.folder, local)
        return target

    def push_to_hub(self, repository: str, *, private: bool | None = None) -> str:
        """Uploads the whole pipeline to the hub as one commit; returns `org/name@commit`.

        The token comes from HF_TOKEN or `hf auth login`. A second call resumes an interrupted upload.

        Args:
            repository: org/name, or org/name@branch; created if missing.
            private: visibility of a repository that is created; None: the owner's default.

        Raises:
            UserError: the hub rejects the upload, or the connection was lost.
        """
        # Exports of older versions become a whole pipeline in a scratch folder first.
        check_target(repository)
        with tempfile.TemporaryDirectory(prefix="digseg_jax_") as scratch:
            whole = self.folder
            if not (whole / PIPELINE_FILE).is_file():
                whole = Path(scratch)
                copy_export(self.folder, whole)
            return push_export(whole, repository, private=private)
