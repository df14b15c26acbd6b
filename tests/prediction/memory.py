# SPDX-License-Identifier: Apache-2.0
"""Memory of --mode=predict: python tests/prediction/memory.py HEIGHT WIDTH QUERIES [DECODER] [CODEC]

Runs the command twice, on an image of one view and on one of HEIGHT x WIDTH, and prints one line of
JSON: the peaks of both, their difference in bytes, and how often progress inside the image was shown.
The model is tiny: what is measured is what the host holds of image, views and masks, which is the same
for any weights of these sizes. This process imports little, since a child's peak counts from its
parent's.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

VIEW = 128  # pixels, as the shipped segmenter's
TESTS = Path(__file__).parents[1]
SETS = {8: "landcover", 59: "pascal_context_59", 150: "ade20k"}  # classes -> whose names are asked


def write_export(folder: Path, name: str, decoder: str, codec: str) -> None:
    """FOLDER/export, in a process of its own."""
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    import tiny

    config = tiny.config(
        tiny.write_folders(folder), data__name=name, data__scale_unit="pixel", data__scale_min=1.0,
        data__scale_max=1.0, model__codec=codec, eval__view_size=(VIEW,), eval__decoder=decoder,
        eval__batch_size=1,
    )  # fmt: skip
    tiny.export(config, folder / "export")


def predict(folder: Path, name: str, height: int, width: int) -> tuple[int, str]:
    """The peak of the command on an image of noise, bytes, and what it told."""
    image, log = folder / f"{height}x{width}.png", folder / f"{height}x{width}.log"
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(noise).save(image)
    command = [
        sys.executable, "-m", "digseg_jax.main", "--mode=predict", f"--model={folder / 'export'}",
        f"--image={image}", f"--vocabulary={name}", f"--out={folder / image.stem}", "--sampling=1x1",
    ]  # fmt: skip
    with log.open("wb") as told:
        child = subprocess.Popen(command, cwd=TESTS.parent, stdout=told, stderr=told)
        _, status, usage = os.wait4(child.pid, 0)
    text = log.read_text()
    if status:
        raise SystemExit(f"{command}: status {status}\n{text}")
    return 1024 * usage.ru_maxrss, text


def measure(folder: Path, height: int, width: int, queries: int, *kind: str) -> dict[str, Any]:
    """kind: decoder and codec."""
    name = SETS[queries]
    made = [sys.executable, __file__, "export", str(folder), name, *kind]
    subprocess.run(made, check=True)
    model, _ = predict(folder, name, VIEW, VIEW)
    peak, text = predict(folder, name, height, width)
    told = re.findall(rf"{height}x{width}\.png (\d+)/(\d+)", text)
    files = len(list((folder / f"{height}x{width}").iterdir()))
    return {"model": model, "peak": peak, "over": peak - model, "told": len(told), "files": files}


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if sys.argv[1] == "export":
        write_export(Path(sys.argv[2]), *sys.argv[3:])
    else:
        kind = (*sys.argv[4:], *("latent_mean", "binary")[len(sys.argv) - 4 :])
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(measure(Path(scratch), *map(int, sys.argv[1:4]), *kind)))
