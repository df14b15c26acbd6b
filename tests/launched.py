# SPDX-License-Identifier: Apache-2.0
"""The launchers for their tests: settings, runs with nothing else set, and stand-ins for commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pod import ROOT

LAUNCH = ROOT / "launch"
FLAGS = ["--config=configs/quickstart.py", "--workdir=gs://bucket/a run's"]
SETTINGS = {
    "tpu_vm.sh": {"TPU": "slice", "ZONE": "us-east5-b"},
    "queued_resource.sh": {"NAME": "r", "ZONE": "z", "TYPE": "v6e-8", "RUNTIME": "v2"},
    "gke_jobset.sh": {
        "NAME": "r", "IMAGE": "i:1", "ACCELERATOR": "tpu-v6e-slice", "TOPOLOGY": "4x8",
        "HOSTS": "8", "CHIPS": "4",
    },
    "slurm.sh": {"NODES": "2", "GPUS": "4", "VENV": "/opt/a venv"},
}  # fmt: skip
TOKEN = "DIGSEG_JAX_TOKEN"
# A launcher must need no more than this; what else is set here, it may take for a setting of its own.
PLAIN = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "PYTHON": sys.executable}


def run(
    script: str, *arguments: str, folder: Path = LAUNCH, **settings: str
) -> subprocess.CompletedProcess:
    command, env = [str(folder / script), *arguments], PLAIN | settings
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd="/", timeout=600)


def refused(done: subprocess.CompletedProcess) -> str:
    """The one line of a refusal."""
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def fake(folder: Path, **commands: str) -> str:
    """Puts commands with these bodies in front of PATH; returns that PATH."""
    folder.mkdir(exist_ok=True)
    for name, body in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def dry(script: str) -> str:
    done = run(script, "--dry-run", *FLAGS, **SETTINGS[script])
    assert done.returncode == 0, done.stderr
    return done.stdout
