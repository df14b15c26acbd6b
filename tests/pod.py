# SPDX-License-Identifier: Apache-2.0
"""Real processes for the tests: `main` once or several times, as one run, with a log of each."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from digseg_jax.io.metric_writer import read_metrics

ROOT = Path(__file__).parents[1]
PATIENCE = 900.0  # seconds; a busy machine is slow, a hanging test must end


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Pod:
    """`count` processes of `main` with `devices` CPU devices each; their output in `folder`/I.log.

    cores: the one core of each process; by default all have all.
    """

    def __init__(
        self,
        folder: Path,
        flags: list[str],
        count: int = 1,
        devices: int = 1,
        *,
        port: int | None = None,
        only: list[int] | None = None,
        cores: Sequence[int] = (),
        env: dict[str, str] | None = None,
        start_timeout: float = 300.0,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        address = f"127.0.0.1:{port or free_port()}"
        # as the main job has it: without the tests' settings for speed the numbers would be others
        (scratch := folder / "tmp").mkdir(exist_ok=True)  # what a kill leaves goes with the folder
        ours = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "TMPDIR": str(scratch)}
        env = os.environ | ours | (env or {})
        self.logs, self.processes, self.drains = [], [], []
        self._began: list[float] = []  # when each process wrote its first line
        for i in range(count) if only is None else only:
            command = [sys.executable, "-u", "-m", "digseg_jax.main", *flags]
            if count > 1:
                command += [f"--coordinator={address}", f"--num_processes={count}"]
                command += [f"--process_id={i}", f"--start_timeout={start_timeout}"]
            if cores:
                command = ["taskset", "--cpu-list", str(cores[i]), *command]
            self.logs.append(folder / f"{i}.log")
            # through a pipe, so that a limit on the process's files does not cut its log
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            self.processes.append(process)
            drain = threading.Thread(target=self._drain, args=(process, self.logs[-1]), daemon=True)
            drain.start()
            self.drains.append(drain)

    def wait(self, patience: float = PATIENCE) -> list[int]:
        """The exit statuses; kills what has not ended in time."""
        end = time.monotonic() + patience
        try:
            codes = [p.wait(max(end - time.monotonic(), 0.1)) for p in self.processes]
            for drain in self.drains:
                drain.join(10)
            return codes
        finally:
            self.kill()

    def check(self) -> None:
        """Waits for success; otherwise fails with the end of the logs."""
        codes = self.wait()
        assert codes == [0] * len(codes), f"{codes}\n{self.text()}"

    def said_for(self) -> float:
        """Seconds since the first line of a process, without the time to load the libraries."""
        return time.monotonic() - min(self._began)

    def text(self) -> str:
        return "\n".join(f"--- {log}\n{log.read_text()[-4000:]}" for log in self.logs)

    def when(self, condition: Callable[[], bool], patience: float = PATIENCE) -> None:
        """Returns as soon as the condition holds; fails if the processes end before."""
        end = time.monotonic() + patience
        while not condition():
            if any(p.poll() is not None for p in self.processes) or time.monotonic() > end:
                self.kill()
                raise AssertionError(f"it did not come to this\n{self.text()}")
            time.sleep(0.02)

    def kill(self, sign: int = signal.SIGKILL) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(sign)
        if sign == signal.SIGKILL:
            for process in self.processes:
                process.wait()

    def _drain(self, process: subprocess.Popen, path: Path) -> None:
        with path.open("wb", buffering=0) as log:
            for block in iter(lambda: os.read(process.stdout.fileno(), 2**16), b""):
                if not log.tell():
                    self._began.append(time.monotonic())
                log.write(block)


def last_step(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return rows[-1]["step"] if rows else 0


def losses(workdir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(workdir / "metrics.jsonl")}


def checkpoints(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []


def examples(workdir: Path) -> dict[int, list[tuple[int, int]]]:
    """Step -> sorted (index, checksum) of what all processes saw in it; a step seen twice shows."""
    seen: dict[int, list[tuple[int, int]]] = {}
    for path in (workdir / "examples").iterdir():
        for line in path.read_text().splitlines():
            row: dict[str, Any] = json.loads(line)
            pairs = zip(row["index"], row["crc"], strict=True)
            seen.setdefault(row["step"], []).extend(pairs)
    return {step: sorted(pairs) for step, pairs in seen.items()}
