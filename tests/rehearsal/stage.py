# SPDX-License-Identifier: Apache-2.0
"""Where the rehearsals take place: a hub on loopback, and processes with some simulated devices."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hub
from hub import layouts, write

from digseg_jax.weights.hub import converted_folder

ROOT = Path(__file__).parents[2]
PATIENCE = 3600.0  # seconds; a busy machine is slow, a hanging test must end
PIPELINES = {"sd-1.5": layouts.SD15, "sd-2.1": layouts.SD21, "marigold": layouts.MARIGOLD}


class Failed(AssertionError):
    """A command ended with an error."""


class Worker:
    """A process that runs commands with `devices` simulated devices, one after another."""

    def __init__(self, devices: int, log: Path, env: dict[str, str]):
        self.log = log
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        env = {**os.environ, **env, "PYTHONPATH": paths}
        env |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        # Every command starts with empty caches: small programs are worth keeping too.
        env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-m", "rehearsal.worker"],
                cwd=ROOT,
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )

    def start(self, *arguments: str) -> None:
        """Sends a command, which `finish` waits for."""
        self.process.stdin.write(json.dumps(arguments) + "\n")
        self.process.stdin.flush()

    def finish(self) -> None:
        """Waits for the command; raises Failed with its traceback."""
        answer = self.process.stdout.readline()
        error = json.loads(answer) if answer else f"the process ended: {self.process.wait()}"
        if error is not None:
            raise Failed(f"{error}\n--- {self.log}\n{self.log.read_text()[-3000:]}")

    def kill_when(self, condition: Callable[[], bool]) -> None:
        """kill -9, as soon as the condition holds; fails where the process ends before."""
        end = time.monotonic() + PATIENCE
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                raise Failed(f"it did not come to this\n{self.log.read_text()[-3000:]}")
            time.sleep(0.01)
        self.kill()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Stage:
    """A hub's environment and a worker for each number of devices, started when it is asked for.

    Attributes:
        env: environment variables that point a process at the hub.
    """

    def __init__(self, folder: Path, env: dict[str, str]):
        self.folder, self.env = folder, env
        self._workers: dict[int, Worker] = {}

    def worker(self, devices: int) -> Worker:
        """The worker with that many devices; a new one, if the last was killed."""
        worker = self._workers.get(devices)
        if worker is None or worker.process.poll() is not None:
            worker = Worker(devices, self.folder / f"{devices}_devices.log", self.env)
            self._workers[devices] = worker
        return worker

    def run(self, devices: int, *arguments: str) -> None:
        """A command of `main`, to its end; raises Failed with its traceback."""
        worker = self.worker(devices)
        worker.start(*arguments)
        worker.finish()

    def close(self) -> None:
        for worker in self._workers.values():
            worker.kill()


def make_shallow(repositories: Path) -> None:
    """Gives U-Nets and autoencoders one layer a block in place of two.

    Classes, levels, places of attention and skip connections stay; a train step, of whose compilation
    most of a story consists, has two thirds of the operations.
    """
    for name, layout in PIPELINES.items():
        shallow = {part: layout[part] | {"layers_per_block": 1} for part in ("unet", "vae")}
        write.write_pipeline(repositories, layout | shallow, name)


@contextlib.contextmanager
def set_up(folder: Path, repositories: Path) -> Iterator[Stage]:
    """A stage whose hub has all repositories; BiomedCLIP is converted, as it must be once."""
    cache = folder / "cache"
    with hub.serve(repositories) as server, hub.environment(server.endpoint, cache) as env:
        hub.biomedclip_folder(converted_folder("biomedclip"))
        stage = Stage(folder, env)
        try:
            yield stage
        finally:
            stage.close()
