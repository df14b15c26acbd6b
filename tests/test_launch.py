# SPDX-License-Identifier: Apache-2.0
"""The launchers: clean for shellcheck, a dry run that prints the commands, a local pod that runs."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from pod import ROOT, losses

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


def run(script: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHON": sys.executable, **settings}
    command = [str(LAUNCH / script), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, cwd="/")


def dry(script: str) -> str:
    done = run(script, "--dry-run", *FLAGS, **SETTINGS[script])
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing():
    scripts = sorted(map(str, LAUNCH.glob("*.sh")))
    done = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [*SETTINGS, "local_pod.sh"])
def test_without_arguments_the_head_of_the_script_is_shown(script):
    done = run(script)
    assert done.returncode == 2
    assert f"launch/{script}" in done.stderr and "--dry-run" in done.stderr


@pytest.mark.parametrize("script", SETTINGS)
def test_a_missing_setting_is_named(script):
    for name in SETTINGS[script] if script != "slurm.sh" else ():
        rest = {k: v for k, v in SETTINGS[script].items() if k != name}
        done = run(script, "--dry-run", *FLAGS, **rest)
        assert done.returncode == 2 and f"error: set {name} " in done.stderr


def test_tpu_vm_runs_the_same_command_on_every_host():
    *_, last = dry("tpu_vm.sh").splitlines()
    words = shlex.split(last.replace("$'", "'").replace("\\n", " ; ").replace("\\'", "'\\''"))
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice"]
    assert "--worker=all" in words and "digseg_jax.main" in words[-1]


def test_queued_resource_asks_runs_and_gives_back():
    text = dry("queued_resource.sh")
    wanted = ("queued-resources create r", "tpu-vm ssh r", "queued-resources delete r")
    places = [text.index(command) for command in wanted]
    assert places == sorted(places) and "--spot" in text


def test_the_jobset_manifest_is_what_kubernetes_will_read():
    yaml = pytest.importorskip("yaml")
    jobset = yaml.safe_load(dry("gke_jobset.sh"))
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 8
    (container,) = job["template"]["spec"]["containers"]
    assert container["args"] == FLAGS
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {
        "action": "FailJob", "onExitCodes": {"containerName": "main", "operator": "In", "values": [2]}
    }  # fmt: skip


def test_the_slurm_script_is_shell_and_goes_back_into_the_queue_after_a_preemption(tmp_path):
    text = dry("slurm.sh")
    assert "#SBATCH --ntasks-per-node=4" in text and "--signal=TERM@90" in text
    # run it with the cluster's commands replaced by ones that say how they were called
    fakes = {"srun": 'printf "%s|" "$@" >> "$OUT"; exit 75', "scontrol": 'echo "$@" >> "$OUT"'}
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    script = text.replace(". /opt/a\\ venv/bin/activate", "")
    assert script != text
    env = {**os.environ, "OUT": str(tmp_path / "out"), "SLURM_JOB_ID": "77"}
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    out = (tmp_path / "out").read_text()
    assert out.endswith("requeue 77\n") and all(flag + "|" in out for flag in FLAGS)


def test_local_pod_prints_one_command_for_each_process():
    done = run("local_pod.sh", "--dry-run", "--port", "4321", "2", *FLAGS)
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[-1] for line in lines] == ["--process_id=0", "--process_id=1"]
    assert all({*FLAGS, "--coordinator=127.0.0.1:4321"} <= set(line) for line in lines)


def test_local_pod_trains_with_two_processes(cover, folders, tmp_path):
    config = tiny.config_file(tmp_path, folders, task="prior", train__steps=2)
    flags = [f"--config={config}", f"--workdir={tmp_path / 'run'}", "--start_timeout=300"]
    done = run("local_pod.sh", "2", *flags)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert list(losses(tmp_path / "run")) == [1, 2]
    assert "[1] " in done.stdout and "process 1 of 2" in done.stdout


def test_local_pod_hands_on_the_status_of_main(tmp_path):
    done = run("local_pod.sh", "2", "--config=absent.py", f"--workdir={tmp_path}")
    assert done.returncode == 2 and "absent.py" in done.stdout


def test_no_launcher_is_left_out_here():
    assert {p.name for p in LAUNCH.glob("*.sh")} == {*SETTINGS, "local_pod.sh", "common.sh"}
    assert all(os.access(LAUNCH / name, os.X_OK) for name in (*SETTINGS, "local_pod.sh"))
    assert Path(LAUNCH / "common.sh").read_text().count("PREEMPTED=75") == 1
