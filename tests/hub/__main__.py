# SPDX-License-Identifier: Apache-2.0
"""python -m tests.hub DIR [--serve]: the miniature repositories, and their server until Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import threading
from pathlib import Path

from .server import serve
from .write import write_all


def main() -> None:
    """Writes DIR; with --serve prints the endpoint and answers until it is interrupted."""
    parser = argparse.ArgumentParser(prog="python -m tests.hub", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--serve", action="store_true")
    options = parser.parse_args()
    print(f"wrote {write_all(options.folder)}")
    if options.serve:
        with serve(options.folder) as server, contextlib.suppress(KeyboardInterrupt):
            print(f"HF_ENDPOINT={server.endpoint}", flush=True)
            threading.Event().wait()


if __name__ == "__main__":
    main()
