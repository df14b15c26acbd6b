# SPDX-License-Identifier: Apache-2.0
"""python -m tests.gpu [--out=gpu.json]: the product at full size on one NVIDIA GPU, in eight minutes.

Trains, evaluates and predicts with Stable Diffusion 1.5's models, random weights, bfloat16, and
compares the first step with the same one on the CPU in float32. Writes one JSON file; status 0 if all
of it ran and agreed. See README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
AGREEMENT = 2e-2  # relative, of the loss in bfloat16 to that in float32
NORM_AGREEMENT = 1e-1  # of the gradient's norm: a wrong backward pass is further off


class Check:
    """The stages of a check, their results, and the time that is left for them."""

    def __init__(self, minutes: float):
        self.started, self.limit = time.monotonic(), 60 * minutes
        self.results: dict[str, Any] = {}

    def left(self) -> float:
        """Seconds."""
        return self.limit - (time.monotonic() - self.started)

    def stage(self, name: str, function: Callable[[], dict[str, Any]]) -> None:
        """Runs a stage; what goes wrong is its result, and the others run all the same."""
        if self.left() <= 0:
            self.results[name] = {"skipped": "no time left"}
            return
        began = time.monotonic()
        try:
            found = function()
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"[:2000]}
        self.results[name] = found | {"seconds": round(time.monotonic() - began, 1)}
        print(f"{name}: {json.dumps(self.results[name])}", flush=True)

    def passed(self) -> bool:
        """Whether every stage ran to its end and agreed."""
        return all(
            not {"error", "skipped"} & r.keys() and r.get("agrees", True) for r in self.results.values()
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the result")
    parser.add_argument("--work", type=Path, help="folder to work in; 25 GB; default: a temporary one")
    parser.add_argument("--minutes", type=float, default=8.0, help="after these no stage begins")
    parser.add_argument("--tiny", action="store_true", help="few channels; runs on a CPU too")
    options = parser.parse_args()

    from digseg_jax.runtime import cpu, gpu

    cpu.tune()
    gpu.tune()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        check, facts = run(Path(folder), tiny=options.tiny, minutes=options.minutes)
    seconds = round(time.monotonic() - check.started, 1)
    result = facts | check.results | {"seconds": seconds, "passed": check.passed()}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{options.out}: {'passed' if result['passed'] else 'FAILED'} in {seconds} s")
    return 0 if result["passed"] else 1


def run(folder: Path, *, tiny: bool, minutes: float) -> tuple[Check, dict[str, Any]]:
    """All stages, and what they ran on."""
    import jax

    from digseg_jax.config.parse import to_dict
    from digseg_jax.training.tasks.parts import choose_kernels

    from . import inputs

    check = Check(minutes)
    config = inputs.write(folder, inputs.TINY if tiny else inputs.FULL)
    device = jax.local_devices()[0]
    dtype, tensor = config.model.dtype, config.mesh.tensor
    kernels = choose_kernels(config.compute, jax.devices(), dtype, tensor)
    facts = {
        "device_kind": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "tiny": tiny,
        "attention": kernels.attention,
        "dtype": dtype,
        "model": dataclasses.asdict(config.model),
    }
    files = [folder / "config.json", folder / "reference.json"]
    files[0].write_text(json.dumps(to_dict(config)))
    reference = subprocess.Popen(
        [sys.executable, "-m", "tests.gpu.reference", *files],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=ROOT,
    )
    workdir = folder / "run"
    try:
        check.stage("train", lambda: train(config, workdir, device))
        check.stage("evaluation", lambda: evaluation(config, workdir, device))
        check.stage("predict", lambda: predict(config, workdir, device))
        check.stage("agreement", lambda: agreement(reference, folder, workdir, check.left()))
    finally:
        reference.kill()
        reference.wait()
    return check, facts


def peak_bytes(device: Any) -> int | None:
    """The most memory that was in use so far; None where the platform does not tell."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def train(config: Any, workdir: Path, device: Any) -> dict[str, Any]:
    """`--mode=train` to the end: steps, checkpoint, export, 8x2 evaluation, report."""
    from digseg_jax import jobs
    from digseg_jax.io.storage import as_path

    jobs.train(config, as_path(workdir))
    rows = _metrics(workdir)[1:]  # the first step waits for its compilation
    found = {"images_per_second": statistics.median(r["images_per_second"] for r in rows)}
    if "mfu" in rows[0]:
        found["mfu"] = statistics.median(r["mfu"] for r in rows)
    return found | {
        "images": config.train.batch_size,
        "masks": config.train.batch_size * config.data.num_queries,
        "loss": [r["loss"] for r in _metrics(workdir)],
        "peak_bytes": peak_bytes(device),
        "report": (workdir / "report" / "index.html").is_file(),
    }


def evaluation(config: Any, workdir: Path, device: Any) -> dict[str, Any]:
    """What the end of the training evaluated; its time without compilation."""
    from .inputs import CLASSES

    results = json.loads((workdir / "eval" / "results.json").read_text())
    speed = json.loads((workdir / "eval" / "speed.json").read_text())
    return {
        "estep": f"{results['ensemble']}x{results['steps']}",
        "classes": len(CLASSES),
        "images_per_second": speed["images_per_second"],
        "num_images": results["num_images"],
        "miou": results["miou"],
        "peak_bytes": peak_bytes(device),
    }


def predict(config: Any, workdir: Path, device: Any) -> dict[str, Any]:
    """Free-text queries on an image that is larger than a crop, with the exported weights."""
    import numpy as np

    from digseg_jax.config.sampling import EStep
    from digseg_jax.prediction.pretrained import load_segmenter
    from digseg_jax.prediction.request import Request

    segmenter = load_segmenter(workdir / "export", config)
    rng = np.random.default_rng(1)
    size = config.data.image_size
    image = rng.integers(0, 256, (size, size + size // 2, 3), np.uint8)
    request = Request(image, 0, ("a photo of the sky", "a road", "water"))

    seconds = []
    for _ in range(2):  # the first one compiles
        began = time.monotonic()
        (answer,) = segmenter.segment([request], EStep(8, 2))
        masks = answer.stack()
        seconds.append(time.monotonic() - began)
    if masks.shape != (3, *image.shape[:2]) or not ((masks >= 0) & (masks <= 1)).all():
        raise ValueError(f"masks {masks.shape} from {masks.min()} to {masks.max()}")
    return {
        "images_per_second": 1 / seconds[1],
        "first_seconds": round(seconds[0], 1),
        "image": list(image.shape),
        "queries": len(masks),
        "peak_bytes": peak_bytes(device),
    }


def agreement(
    reference: subprocess.Popen, folder: Path, workdir: Path, timeout: float
) -> dict[str, Any]:
    """The first step's loss and gradient norm beside those of the CPU in float32."""
    try:
        status = reference.wait(timeout)
    except subprocess.TimeoutExpired:
        return {"skipped": "the CPU had not finished its step in time"}
    if status:
        return {"error": f"the step on the CPU ended with status {status}"}
    expected = json.loads((folder / "reference.json").read_text())
    first = _metrics(workdir)[0]
    off = {name: abs(first[name] / expected[name] - 1) for name in ("loss", "grad_norm")}
    return {
        "here": {name: first[name] for name in off},
        "cpu_float32": expected,
        "relative": off,
        "agrees": off["loss"] <= AGREEMENT and off["grad_norm"] <= NORM_AGREEMENT,
    }


def _metrics(workdir: Path) -> list[dict[str, Any]]:
    """The rows of the training's metrics that have a loss."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


if __name__ == "__main__":
    sys.exit(main())
