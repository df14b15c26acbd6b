# SPDX-License-Identifier: Apache-2.0
"""The page of a run that is still training: curves, and a few fixed validation images with masks."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from digseg_jax.config.schema import DataConfig
from digseg_jax.data.datasets.registry import title
from digseg_jax.errors import UserError
from digseg_jax.io import storage
from digseg_jax.io.metric_writer import METRICS_NAME, MetricWriter
from digseg_jax.io.storage import AnyPath
from digseg_jax.io.workdir import VALIDATION
from digseg_jax.log import log
from digseg_jax.report.build import on_disk, optional_object, read_training, shaped
from digseg_jax.report.cards import gallery_cards
from digseg_jax.report.chart import training_charts
from digseg_jax.runtime.distributed import is_main
from digseg_jax.viz.colors import from_hex, to_hex
from digseg_jax.viz.gallery import GALLERY_NAME, gallery_strips
from digseg_jax.viz.templates import render

NAME = "live.html"
REFRESH = 60  # seconds after which a browser loads the page again
LISTED = 3  # data sets of a mixture that are named


class LivePage:
    """WORKDIR/report/live.html, rewritten after each validation; its images go to TensorBoard, too.

    Args:
      workdir: the run's.
      name: what the run is trained on.
      steps: number of steps of the whole training.
      every: steps from one validation to the next.
    """

    def __init__(self, workdir: AnyPath, name: str, steps: int, every: int = 1):
        self.workdir, self.name, self.steps, self.every = workdir, name, steps, every
        self.told = False

    @classmethod
    def of(cls, workdir: AnyPath, data: DataConfig, steps: int, every: int) -> Self:
        """The page of a run: its data, its length, and the steps between validations (0: none)."""
        return cls(workdir, training_name(data), steps, every or steps)

    def __call__(self, step: int, writer: MetricWriter) -> None:
        """Shows a step's validation on process 0; writer: the run's.

        A page that cannot be written is a warning: it must never stop a run.
        """
        if not is_main():
            return
        try:
            writer.sync()  # the page reads the record
            self._write(step, writer)
        except (UserError, OSError) as error:
            log.warning("step %d: no live page (%s)", step, error)

    def _write(self, step: int, writer: MetricWriter) -> None:
        """Writes the page and the images."""
        with on_disk(self.workdir, (METRICS_NAME, f"{VALIDATION}/gallery")) as source:
            text = self.render(source, step)
            writer.write_images(step, gallery_strips(source / VALIDATION / "gallery"))

        page = self.workdir / "report" / NAME
        storage.write_bytes(page, text.encode("utf-8"))
        if not self.told:
            log.info("look at it while it trains: %s", page)
            self.told = True

    def render(self, workdir: Path, step: int) -> str:
        """The page as HTML, from the run's files on a disk."""
        path = workdir / VALIDATION / "gallery" / GALLERY_NAME
        gallery = optional_object(path)
        colors = shaped(
            path,
            lambda: {c["name"]: to_hex(from_hex(c["color"])) for c in gallery.get("classes", [])},
        )

        # Without another validation the page stays as it is.
        last = step + self.every > self.steps
        return render(
            "report/live.html.j2",
            name=self.name,
            run=workdir.resolve().name,
            refresh=0 if last else REFRESH,
            step=step,
            steps=self.steps,
            gallery=shaped(
                path, lambda: gallery_cards(gallery, path.parent, colors, "Validation images")
            ),
            charts=training_charts(read_training(workdir)),
        )


def training_name(data: DataConfig) -> str:
    """What a run is trained on, as a page names it: a data set, or those of a mixture."""
    if not data.mixture:
        return title(data.name, data.root)
    parts = [title(part.name, part.folder or part.root) for part in data.mixture]
    return ", ".join(parts) if len(parts) <= LISTED else f"a mixture of {len(parts)} data sets"
