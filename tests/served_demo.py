# SPDX-License-Identifier: Apache-2.0
"""A demo of tiny weights on loopback, whose steps wait until a test lets them go on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import tiny

from digseg_jax.demo.page import Page
from digseg_jax.demo.server import Demo
from digseg_jax.demo.work import Queue
from digseg_jax.prediction.pretrained import PretrainedSegmenter, load_segmenter


def tiny_segmenter(folders: dict[str, str], folder: Path) -> PretrainedSegmenter:
    """Weights that were never trained, in views of 32 pixels."""
    config = tiny.config(folders, eval__view_size=())
    tiny.export(config, folder)
    return load_segmenter(folder, config)


@contextlib.contextmanager
def serve(segmenter: PretrainedSegmenter, gate: threading.Event) -> Iterator[Demo]:
    """A running demo, whose engine waits at the gate before each step is seen."""

    def segment(*arguments, watch, **options):
        def waiting(moment):
            assert gate.wait(60)
            watch(moment)

        return segmenter(*arguments, watch=waiting, **options)

    queue = Queue(segment, seed=3)
    server = Demo(queue, Page("tiny weights", segmenter))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    gate.set()
    server.shutdown()
    server.server_close()
    queue.close()
    thread.join()
