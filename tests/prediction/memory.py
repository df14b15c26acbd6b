# SPDX-License-Identifier: Apache-2.0
"""Resident memory of a prediction: python tests/prediction/memory.py HEIGHT WIDTH QUERIES [DECODER]

Prints one line of JSON: bytes when the model had answered a small image, the peak until a large one was
answered and until its files were written, and how often progress was told. The model is tiny: what is
measured is what the host holds of image, views and masks, the same for any weights of these sizes.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path

import numpy as np

VIEW = 128  # pixels, as the shipped segmenter's


def resident(what: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at the most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{what}:\s+(\d+) kB", status)[1])


def measure(folder: Path, height: int, width: int, queries: int, decoder: str) -> dict[str, int]:
    import tiny

    from digseg_jax.prediction.pretrained import load_segmenter

    settings = {"eval__view_size": (VIEW,), "eval__decoder": decoder, "eval__batch_size": 4}
    config = tiny.config(tiny.write_folders(folder), **settings)
    tiny.export(config, folder / "export")
    segment = load_segmenter(folder / "export")
    rng, words = np.random.default_rng(0), [f"land {i}" for i in range(queries)]
    image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    segment(image[: 2 * VIEW, : 2 * VIEW], words, ensemble=1, steps=1).write(folder / "small.png")

    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    before, told = resident("VmRSS"), []
    masks = segment(image, words, ensemble=1, steps=1, advance=lambda *numbers: told.append(numbers))
    answered = resident("VmHWM")
    masks.write(folder / "mask.png")
    peak = resident("VmHWM")
    return {"model": before, "answered": answered, "peak": peak, "progress": len(told)}


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.path.insert(0, str(Path(__file__).parents[2]))
    decoder = sys.argv[4] if len(sys.argv) > 4 else "latent_mean"
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(Path(scratch), *map(int, sys.argv[1:4]), decoder)))
