# SPDX-License-Identifier: Apache-2.0
"""Several processes on this machine as one run: their commands, their signals, their statuses."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time

import pytest
import tiny
from launched import FLAGS, LAUNCH, PLAIN, fake, run
from pod import losses


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [((0, 0), 0), ((75, 134), 75), ((134, 75), 75), ((137, 75), 75), ((2, 75), 2), ((75, 2), 2),
     ((134, 1), 1), ((75, 1), 1), ((1, 75), 1), ((1, 2), 2), ((0, 3), 3), ((3, 134), 3),
     ((143, 75), 75)],
)  # fmt: skip
def test_local_pod_tells_what_a_launcher_has_to_do(tmp_path, statuses, expected):
    """Refused beats crashed, which beats what passes, which beats the abort of the other processes."""
    first, second = statuses
    body = f"for last; do :; done; set {first} {second}; shift ${{last#*=}}; exit $1"
    path = fake(tmp_path / "bin", python=body)
    settings = {"PATH": path, "PYTHON": "python"}
    assert run("local_pod.sh", "--port", "1", "2", *FLAGS, **settings).returncode == expected


def test_local_pod_hands_sigterm_on_to_every_process(tmp_path):
    # A shell's `wait` ends at once at a signal, so that it need not sleep in small pieces.
    body = (
        'for last; do :; done; trap "echo saved >> $OUT; exit 75" TERM\n'
        'echo ready >> "$OUT"; sleep 60 & wait; kill $!'
    )
    path, out = fake(tmp_path / "bin", python=body), tmp_path / "out"
    env = PLAIN | {"PATH": path, "PYTHON": "python", "OUT": str(out)}
    command = [str(LAUNCH / "local_pod.sh"), "--port", "1", "2", *FLAGS]
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as pod:
        end = time.monotonic() + 60
        while not out.exists() or out.read_text().count("ready") < 2:
            assert time.monotonic() < end, "they did not start"
            time.sleep(0.02)
        pod.send_signal(signal.SIGTERM)
        assert pod.wait(60) == 75
    assert out.read_text().split() == ["ready", "ready", "saved", "saved"]


def test_local_pod_prints_one_command_for_each_process():
    done = run("local_pod.sh", "--dry-run", "--port", "4321", "2", *FLAGS)
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[-1] for line in lines] == ["--process_id=0", "--process_id=1"]
    assert all({*FLAGS, "--coordinator=127.0.0.1:4321"} <= set(line) for line in lines)


def test_local_pod_trains_with_two_processes(cover, folders, tmp_path):
    config = tiny.config_file(tmp_path, folders, task="prior", train__steps=2)
    flags = [f"--config={config}", f"--workdir={tmp_path / 'run'}", "--start_timeout=300"]
    kept = {name: value for name, value in os.environ.items() if name.startswith(("JAX_", "XLA_"))}
    done = run("local_pod.sh", "2", *flags, TMPDIR=str(tmp_path), **kept)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert list(losses(tmp_path / "run")) == [1, 2]
    assert "[1] " in done.stdout and "process 1 of 2" in done.stdout


def test_local_pod_hands_on_the_status_of_main(tmp_path):
    done = run("local_pod.sh", "2", "--config=absent.py", f"--workdir={tmp_path}")
    assert done.returncode == 2 and "absent.py" in done.stdout
