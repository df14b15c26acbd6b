# SPDX-License-Identifier: Apache-2.0
"""configs/ade20k.py once at Stable Diffusion 1.5's full size, with random weights, in float32.

    cd tests && PYTHONPATH=..:parity python -m rehearsal.full_size FOLDER [--miniature]

A hub on loopback, two steps with a kill between them, an evaluation of one image, an export, and the
same U-Net in torch diffusers where torch is installed. Writes FOLDER/figures.json: seconds and peak
memory of each command. --miniature: the tests' small weights instead, to try the script itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hub
from hub import layouts, write

from rehearsal import trees
from rehearsal.export_check import check_export

ROOT = Path(__file__).parents[2]
STEPS = 2
CHANGES = {
    "train.steps": STEPS,
    "train.batch_size": 1,
    "train.log_every": 1,
    "checkpoint.every": 1,
    "checkpoint.keep": 1,
    "data.num_queries": 1,
    "data.workers": 0,
    "model.dtype": "float32",
    "optim.ema_decay": 0.0,  # a fourth of the state
    "eval.ensemble": 1,
    "eval.steps": 1,
    "eval.num_images": 1,
    "eval.batch_size": 1,
    "eval.decode_limit": 4,
    "eval.gallery": 1,
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

    Returns its seconds and the peak of its memory in GB; raises CalledProcessError with its log's end.
    """
    started, peak = time.monotonic(), 0
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=output)
    killed = False
    try:
        while process.poll() is None:
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                peak = max(peak, int(next(x for x in lines if x.startswith("VmHWM")).split()[1]))
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
    options = parser.parse_args()
    folder: Path = options.folder
    run, data = folder / "run", folder / "data"
    repositories = folder / "repositories"
    if not repositories.exists():
        values = layouts.SD15 if options.miniature else layout()
        write.write_pipeline(repositories, values, "sd-1.5")
    trees.write_tree("ade20k", data)
    size = {"data.image_size": 64} if options.miniature else {}

    command = [sys.executable, "-m", "digseg_jax.main", "--config=configs/ade20k.py"]
    command += [f"--workdir={run}", f"--config.data.root={data}"]
    command += [f"--config.{key}={value}" for key, value in (CHANGES | size).items()]
    figures = {}

    def saved() -> bool:
        return (run / "checkpoints" / "1").is_dir()

    with hub.serve(repositories) as server:
        env = {**os.environ, **hub.variables(server.endpoint, folder / "cache"), "JAX_PLATFORMS": "cpu"}
        figures["killed after step 1"] = measure(command, env, folder / "killed.log", saved)
        figures["resumed, evaluated"] = measure(command, env, folder / "resumed.log")
        export = [*command, "--mode=export"]
        figures["exported"] = measure(export, env, folder / "export.log")
    results = json.loads((run / "eval" / "results.json").read_text())
    assert "resumed from" in (folder / "resumed.log").read_text()
    assert len(results["confusion"]) == 150
    cells = 8 if options.miniature else 64
    figures["agrees with torch"] = check_export(run / "export", cells)
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
