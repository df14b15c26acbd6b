# SPDX-License-Identifier: Apache-2.0
"""The job of --mode=predict: any images, any queries, with the shipped or a run's weights."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from digseg_jax.arraytypes import Params
from digseg_jax.config.parse import with_sampling
from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import Config
from digseg_jax.errors import UserError
from digseg_jax.io.progress import Progress
from digseg_jax.io.workdir import CALIBRATION
from digseg_jax.log import log
from digseg_jax.prediction.description import check_agreement, find_export, read_description
from digseg_jax.prediction.files import find_images, find_queries, read_image, targets, write_prediction
from digseg_jax.prediction.segmenter import Request, Segmenter
from digseg_jax.runtime.sharding import make_mesh
from digseg_jax.training.mesh_choice import chosen
from digseg_jax.training.tasks.parts import for_devices
from digseg_jax.training.tasks.segmentation import load_task
from digseg_jax.weights import load_params

SHIPPED = "assets:segmenter"


def predict(
    config: Config | None,
    model: str | None,
    image: str,
    queries: Sequence[str],
    out: Path,
    vocabulary: str | None = None,
    estep: str | None = None,
) -> None:
    """Segments every image that `image` (file, folder or glob) names; see `write_prediction`.

    config: None takes everything from the weights' own description. model: the weights, as
    `find_export` takes them; None: the shipped ones. estep: members x steps, such as "8x2".

    Raises:
      UserError: unreadable image, empty query, missing weights, weights that were trained with another
        configuration, unwritable output.
    """
    texts = find_queries(queries, vocabulary)
    images = find_images(image)
    paths = targets(images, out)
    if len(images) == 1:
        read_image(images[0])  # an unreadable one is told before the models are built
    folder = find_export(model or SHIPPED)
    if config is None:
        config = read_description(folder).training_config()
    if estep:
        config = with_sampling(config, estep)
    segmenter, _ = load_segmenter(config, folder)
    sampling = EStep(config.eval.ensemble, config.eval.steps, config.eval.spacing)
    mode = "window" if config.eval.inference == "auto" else config.eval.inference
    progress = Progress(len(images), label=f"predict {sampling}", unit="images")
    started = time.monotonic()
    for done, (source, path) in enumerate(zip(images, paths, strict=True), start=1):
        pixels = read_image(source)
        request = Request(pixels, 0, tuple(texts))
        with contextlib.closing(_Windows(source)) as windows:
            (answer,) = segmenter.segment(
                [request], sampling, key=config.seed, mode=mode, advance=windows.update
            )
        masks = (answer.probability(q) for q in range(answer.num_queries))
        facts = {"image": str(source), "estep": str(sampling), "seed": config.seed}
        summary = write_prediction(path, pixels, texts, masks, facts)
        covered = ", ".join(f"{r['query']} {100 * r['coverage']:.1f} %" for r in summary["queries"])
        log.info("%s: %s -> %s", source, covered, path)
        progress.update(done, done / (time.monotonic() - started))
    progress.close()


class _Windows:
    """Progress inside an image that takes several calls; nothing is shown of one that takes one."""

    def __init__(self, image: Path):
        self.image, self.started = image, time.monotonic()
        self.progress: Progress | None = None

    def update(self, done: int, calls: int) -> None:
        """Tells how many of the image's calls are done."""
        if calls == 1:
            return
        if self.progress is None:
            self.progress = Progress(calls, label=f"  {self.image.name}", unit="calls")
        self.progress.update(done, done / (time.monotonic() - self.started))

    def close(self) -> None:
        if self.progress is not None:
            self.progress.close()


def load_segmenter(config: Config, folder: Path) -> tuple[Segmenter, Params]:
    """The exported weights of `folder`, ready to be asked on all devices; and the weights.

    Raises:
      UserError: there are none, or they were trained with another configuration.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no trained weights here; run --mode=train first")
    description = read_description(folder)
    check_agreement(description, config, folder)
    config = description.with_pinned_parts(config)

    # the architecture comes with the weights; nothing of the prior is needed
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, unet=str(folder)))
    config = for_devices(config, jax.devices())
    task = load_task(config, prompts=("any",))  # the segmenter encodes its own queries
    task.adopt(folder)
    calibration = folder / CALIBRATION
    scale = json.loads(calibration.read_text())["scale"] if calibration.is_file() else 2.0
    mesh = make_mesh(chosen(config, task, jax.devices()))
    params = load_params(folder, task.abstract)
    return Segmenter(task, params, mesh=mesh, scale=float(scale)), params
