# SPDX-License-Identifier: Apache-2.0
"""configs/ade20k.py:sd15 once at Stable Diffusion 1.5's full size, with random weights, in float32.

    cd tests
    PYTHONPATH=..:parity python -m rehearsal.full_size FOLDER [--miniature] [--config.KEY=VALUE ...]

A hub and a bucket on loopback, two steps with a kill between them, an evaluation of one image, an
export, and where torch is installed the same U-Net and the same mask there. Writes
FOLDER/figures.json: seconds and peak memory of each command. 40 GB of disk. --miniature: the tests'
small weights instead, to try the script itself. --config...: more changes, such as
--config.optim.freeze="('^down_blocks','^up_blocks')" where there is little memory.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hub
from gcs import server as gcs
from gcs.server import BUCKET
from hub import layouts, write

from digseg_jax.io import storage
from digseg_jax.weights import catalog
from rehearsal import trees
from rehearsal.export_check import check_export, check_mask

ROOT = Path(__file__).parents[2]
STEPS = 2
CHANGES = {
    "train.steps": STEPS,
    "train.batch_size": 1,
    "logging.every": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "data.num_queries": 1,
    "loading.workers": 0,
    "model.dtype": "float32",
    "optim.ema_decay": 0.0,  # a fourth of the state
    "optim.mu_dtype": "bfloat16",  # an eighth
    "eval.ensemble": 1,
    "eval.steps": 1,
    "eval.num_images": 1,
    "eval.decode_limit": 4,
}


def layout() -> dict[str, Any]:
    """The pipeline's JSON files with the widths of the real one."""
    unet = {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768}
    vae = {"block_out_channels": [128, 256, 512, 512], "norm_num_groups": 32}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    text |= {"num_hidden_layers": 12, "projection_dim": 768}
    full = {"unet": unet | {"norm_num_groups": 32}, "vae": vae, "text_encoder": text}
    return layouts.SD15 | {part: layouts.SD15[part] | values for part, values in full.items()}


def measure(command: list[str], env: dict[str, str], log: Path, stop: Any = None) -> dict[str, float]:
    """Runs a command to its end, or until `stop()` holds: then it is killed with -9.

    Returns its seconds and the peak of its memory in GB, swapped pages with it; raises
    CalledProcessError with its log's end.
    """
    started, peak = time.monotonic(), 0
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=output)
    killed = False
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{process.pid}/status").read_text()
                now = dict(re.findall(r"^(VmHWM|VmRSS|VmSwap):\s*(\d+) kB", status, re.MULTILINE))
                now = {name: int(value) for name, value in now.items()}
                if now:
                    peak = max(peak, now["VmHWM"], now["VmRSS"] + now["VmSwap"])
            if stop is not None and stop():
                process.kill()
                killed = True
            time.sleep(0.1)
    finally:
        process.kill()
    if stop is not None and not killed:
        raise SystemExit(f"{log}: it ended before it could be killed; is there a run already?")
    if process.returncode and not killed:
        raise subprocess.CalledProcessError(process.returncode, command, log.read_text()[-3000:])
    return {"seconds": time.monotonic() - started, "peak_gb": peak * 1024 / 1e9}


def main() -> None:
    """Does all of it and prints the figures."""
    parser = argparse.ArgumentParser(prog="python -m rehearsal.full_size", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--miniature", action="store_true")
    options, more = parser.parse_known_args()
    folder: Path = options.folder.absolute()
    data, repositories = folder / "data", folder / "repositories"
    side, view = (64, 64) if options.miniature else (512, 128)
    if not repositories.exists():
        values = layouts.SD15 if options.miniature else layout()
        write.write_pipeline(repositories, values, "sd-1.5")
    trees.write_tree("ade20k", data)

    run = f"gs://{BUCKET}/run"
    command = [sys.executable, "-m", "digseg_jax.main", "--config=configs/ade20k.py:sd15"]
    command += [f"--workdir={run}", f"--config.data.root={data}"]
    changes = CHANGES | {"data.image_size": side, "eval.view_size": (view,)}
    changes["compute.compile_cache"] = folder / "compiled"
    command += [*(f"--config.{key}={value}" for key, value in changes.items()), *more]
    figures: dict[str, Any] = {}

    with contextlib.ExitStack() as stack:
        bucket = stack.enter_context(gcs.serve(folder / "bucket"))
        server = stack.enter_context(hub.serve(repositories))
        server.commit(catalog.hub_id("sd-1.5"))  # hashes the files, for which no client waits
        stack.enter_context(hub.environment(server.endpoint, folder / "cache"))
        stack.enter_context(gcs.environment(bucket.env()))
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "TMPDIR": str(folder)}
        figures["killed after step 1"] = measure(
            command, env, folder / "killed.log", lambda: 1 in bucket.steps("run")
        )
        figures["resumed, evaluated"] = measure(command, env, folder / "resumed.log")
        export = [*command, "--mode=export"]
        figures["exported"] = measure(export, env, folder / "export.log")

        assert "resumed from" in (folder / "resumed.log").read_text()
        results = json.loads(bucket.read("run/eval/results.json"))
        assert len(results["confusion"]) == 150
        if importlib.util.find_spec("torch"):
            local = storage.local_copy(storage.as_path(f"{run}/export"))
            check_export(local, side // 8)
            figures["largest difference from torch's mask"] = check_mask(local, side)

    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
