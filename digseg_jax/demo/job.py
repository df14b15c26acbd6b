# SPDX-License-Identifier: Apache-2.0
"""The job of --mode=demo: loads a model and serves its page until Ctrl-C."""

from __future__ import annotations

import contextlib
import webbrowser
from collections.abc import Mapping
from typing import Any

from digseg_jax.config.parse import with_settings
from digseg_jax.demo.page import Page
from digseg_jax.demo.server import Demo, check_port
from digseg_jax.demo.work import Queue
from digseg_jax.prediction.description import find_export, read_description
from digseg_jax.prediction.pretrained import SHIPPED, load_segmenter
from digseg_jax.runtime.compile_cache import use_own_compile_cache


def demo(
    model: str | None, port: int, settings: Mapping[str, Any] | None = None, *, browser: bool = True
) -> None:
    """Serves the page of a model on 127.0.0.1, and opens it; ends with KeyboardInterrupt.

    Args:
      model: as `find_export` takes it; None: the shipped weights.
      port: 0 takes a free one.
      settings: values by key such as "eval.steps", in place of the weights' own.
      browser: open the page in the user's browser.

    Raises:
      UserError: there are no such weights, or the port is taken.
    """
    check_port(port)
    name = model or SHIPPED
    folder = find_export(name)
    config = with_settings(read_description(folder).training_config(folder), settings or {})
    use_own_compile_cache(config.compute.compile_cache)
    segmenter = load_segmenter(folder, config)

    with (
        contextlib.closing(Queue(segmenter, config.seed)) as queue,
        Demo(queue, Page(name, segmenter), port) as server,
    ):
        print(f"{server.url}\nOpen this address on this machine; Ctrl-C ends the demo.", flush=True)
        if browser:
            webbrowser.open(server.url)
        server.serve_forever()
