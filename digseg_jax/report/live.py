# SPDX-License-Identifier: Apache-2.0
"""The page of a run that is still training: curves, and a few fixed validation images with masks."""

from __future__ import annotations

import tempfile
from pathlib import Path

from digseg_jax.errors import UserError
from digseg_jax.io import storage
from digseg_jax.io.metric_writer import METRICS_NAME, MetricWriter
from digseg_jax.io.storage import AnyPath
from digseg_jax.io.workdir import VALIDATION
from digseg_jax.log import log
from digseg_jax.report.build import optional_object, read_training, shaped
from digseg_jax.report.cards import gallery_cards
from digseg_jax.report.chart import training_charts
from digseg_jax.runtime.distributed import is_main
from digseg_jax.viz.colors import from_hex, to_hex
from digseg_jax.viz.gallery import GALLERY_NAME, gallery_strips
from digseg_jax.viz.templates import render

NAME = "live.html"
REFRESH = 60  # seconds after which a browser loads the page again


class LivePage:
    """WORKDIR/report/live.html, rewritten after each validation; its images go to TensorBoard, too.

    Args:
      workdir: the run's.
      name: what the run is trained on.
      steps: number of steps of the whole training.
    """

    def __init__(self, workdir: AnyPath, name: str, steps: int):
        self.workdir, self.name, self.steps, self.told = workdir, name, steps, False

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
        # The files of a bucket are fetched first: rendering reads local files only.
        with tempfile.TemporaryDirectory(prefix="digseg_jax_") as scratch:
            source = self.workdir
            if storage.is_remote(self.workdir):
                source = Path(scratch) / self.workdir.name
                storage.download(self.workdir, source, (METRICS_NAME, VALIDATION))
            text = self.render(Path(source), step)
            writer.write_images(step, gallery_strips(Path(source) / VALIDATION / "gallery"))

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

        return render(
            "report/live.html.j2",
            name=self.name,
            run=workdir.resolve().name,
            refresh=REFRESH,
            step=step,
            steps=self.steps,
            gallery=shaped(
                path, lambda: gallery_cards(gallery, path.parent, colors, "Validation images")
            ),
            charts=training_charts(read_training(workdir)),
        )
