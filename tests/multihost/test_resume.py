# SPDX-License-Identifier: Apache-2.0
"""kill -9 at random moments, during a save too; the resumed run is the run that was left alone.

All runs have four devices, shared by 1, 2 or 4 processes. Every step's loss, the examples that it saw
(numbers and checksums of the images) and the exported weights are compared.
"""

from __future__ import annotations

import random
import signal
import time

import numpy as np
import pod
import pytest
import tiny
from safetensors.numpy import load_file

from digseg_jax.errors import PREEMPTED

pytestmark = pytest.mark.usefixtures("cover")
STEPS, INTERVAL = 40, 4
HEARTBEAT = 300.0  # seconds after which JAX has noticed that a process is gone
WEIGHTS = "export/diffusion_pytorch_model.safetensors"


class Run:
    """One working directory and the processes that come and go in it."""

    def __init__(self, folder, folders, steps=STEPS):
        self.folder, self.run, self.starts = folder, folder / "run", 0
        folder.mkdir(parents=True, exist_ok=True)
        config = tiny.config_file(
            folder, folders, task="prior", train__steps=steps, checkpoint__every=INTERVAL,
            logging__examples=True, mesh__data=2, mesh__fsdp=2,
            unet_arch__block_out_channels=(64, 128),
        )  # fmt: skip
        self.flags = [f"--config={config}", f"--workdir={self.run}"]

    def start(self, count: int) -> pod.Pod:
        self.starts += 1
        return pod.Pod(self.folder / f"start{self.starts}", self.flags, count, 4 // count)

    def finish(self, count: int) -> None:
        self.start(count).check()

    def is_saving(self) -> bool:
        folder = self.run / "checkpoints"
        return folder.exists() and any("tmp" in p.name for p in folder.iterdir())

    def kill(self, count: int, after: int, *, while_saving: bool) -> None:
        """Kills all processes with -9 once step `after` is logged, or at the next save from then on.

        The next start loses no more than one interval, also if a save was under way.
        """
        processes = self.start(count)
        processes.when(lambda: pod.last_step(self.run) >= after)
        if while_saving:
            processes.when(self.is_saving)
        processes.kill()
        saving, saved = self.is_saving(), [0, *pod.checkpoints(self.run)][-1]
        lost = pod.last_step(self.run) - saved
        print(f"{count} processes, killed after step {pod.last_step(self.run)}, saving: {saving}, "
              f"goes on from {saved}")  # fmt: skip
        assert lost <= INTERVAL


def assert_same_run(ours: Run, whole: Run, *, bits: bool) -> None:
    a, b = pod.losses(ours.run), pod.losses(whole.run)
    assert list(a) == list(b) == list(range(1, len(b) + 1))
    assert pod.examples(ours.run) == pod.examples(whole.run)
    difference = max(abs(a[step] - b[step]) for step in a)
    print(f"largest difference of a loss {difference:.2e}")
    assert difference <= (0.0 if bits else 1e-5)
    x, y = load_file(ours.run / WEIGHTS), load_file(whole.run / WEIGHTS)
    assert x.keys() == y.keys()
    for key in x:
        if bits:
            np.testing.assert_array_equal(x[key], y[key], err_msg=key)
        else:
            np.testing.assert_allclose(x[key], y[key], atol=1e-4, err_msg=key)


def test_killed_in_a_save_on_two_processes_and_finished_on_one(folders, tmp_path):
    steps = 3 * INTERVAL
    whole, killed = (Run(tmp_path / name, folders, steps) for name in ("whole", "killed"))
    whole.finish(1)
    killed.kill(2, random.SystemRandom().randint(1, INTERVAL), while_saving=True)
    killed.finish(1)
    assert_same_run(killed, whole, bits=False)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_a_process_left_alone_in_a_save_asks_to_be_started_again(victim, folders, tmp_path):
    """Status 75, or 134 where the coordinator itself is gone: the launchers restart after both."""
    run = Run(tmp_path / "run", folders, 3 * INTERVAL)
    processes = run.start(2)
    processes.when(lambda: bool(pod.checkpoints(run.run)))
    processes.when(run.is_saving)
    processes.processes[victim].kill()
    began = time.monotonic()

    # In a save it waits for the other's heartbeat.
    statuses = processes.wait(HEARTBEAT)
    left = statuses[1 - victim]
    print(f"left alone, it ended with {left} after {time.monotonic() - began:.0f} s")
    assert left in (PREEMPTED, *((-signal.SIGABRT,) if victim == 0 else ())), processes.text()
    if left == PREEMPTED:
        assert "start the same command again" in processes.logs[1 - victim].read_text()
    run.finish(2)
    assert list(pod.losses(run.run)) == list(range(1, 3 * INTERVAL + 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("counts", "bits"), [([1] * 4, True), ([2] * 3, True), ([4, 2, 1], False)], ids=str
)
def test_ten_kills(counts, bits, folders, tmp_path):
    """4 + 3 + 3 kills; the last start, which finishes, is on the last number of processes."""
    whole, killed = (Run(tmp_path / name, folders) for name in ("whole", "killed"))
    whole.finish(counts[-1])
    moments = sorted(random.SystemRandom().sample(range(1, STEPS - 2 * INTERVAL), len(counts)))
    for i, (count, after) in enumerate(zip(counts, moments, strict=True)):
        killed.kill(count, after, while_saving=i % 2 == 1)
    killed.finish(counts[-1])
    assert_same_run(killed, whole, bits=bits)
