# SPDX-License-Identifier: Apache-2.0
"""Several real processes as one run: the same losses, one set of files, SIGTERM to one of them."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import time

import numpy as np
import official_trees
import pod
import pytest
import tiny

from digseg_jax.errors import PREEMPTED, USER_ERROR

pytestmark = pytest.mark.usefixtures("cover")
STEPS = 20
GRACE = 5.0  # seconds that a process gets to notice that the other one is gone


def flags(folder, folders, workdir, **changes):
    """A run of the prior: the smallest task that goes through the U-Net."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "task": "prior",
        "train__steps": STEPS,
        "checkpoint__every": 100,
        "logging__examples": True,
    }
    if changes.get("task", "prior") == "prior":  # large enough for FSDP to split them
        options["unet_arch__block_out_channels"] = (64, 128)
    config = tiny.config_file(folder, folders, **(options | changes))
    return [f"--config={config}", f"--workdir={workdir}"]


@pytest.fixture(scope="module")
def alone(folders, tmp_path_factory):
    """The same run on one process with one device."""
    folder = tmp_path_factory.mktemp("alone")
    pod.Pod(folder, flags(folder, folders, folder / "run")).check()
    return folder / "run"


@pytest.mark.parametrize(
    ("count", "devices", "mesh"),
    [
        (2, 1, {"fsdp": 2, "data": 1}),
        pytest.param(2, 1, {"tensor": 2, "data": 1}, marks=pytest.mark.slow),
        pytest.param(4, 1, {"fsdp": 2, "tensor": 2, "data": 1}, marks=pytest.mark.slow),
        pytest.param(2, 2, {"fsdp": 2, "data": 2}, marks=pytest.mark.slow),
        pytest.param(1, 8, {"fsdp": 4, "tensor": 2, "data": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_losses_over_20_steps_equal_those_of_one_process(
    count, devices, mesh, alone, folders, tmp_path
):
    changes = {f"mesh__{axis}": size for axis, size in mesh.items()}
    run = tmp_path / "run"
    pod.Pod(tmp_path, flags(tmp_path, folders, run, **changes), count, devices).check()
    ours, expected = pod.losses(run), pod.losses(alone)
    assert list(ours) == list(range(1, STEPS + 1)) == list(expected)
    difference = max(abs(ours[step] - expected[step]) for step in ours)
    print(f"largest difference {difference:.2e}")
    assert difference <= 1e-5
    seen, wanted = pod.examples(run), pod.examples(alone)
    assert {s: sorted(set(pairs)) for s, pairs in seen.items()} == wanted
    if mesh.get("tensor", 1) == 1:
        assert seen == wanted


def test_sigterm_to_one_of_two_processes_saves_the_same_step_and_leaves(folders, tmp_path):
    run = tmp_path / "run"
    command = flags(tmp_path, folders, run, train__steps=100000, mesh__fsdp=2, mesh__data=1)
    processes = pod.Pod(tmp_path, command, count=2)
    processes.when(lambda: pod.last_step(run) >= 3)
    start = time.monotonic()
    processes.processes[1].send_signal(signal.SIGTERM)
    assert processes.wait() == [PREEMPTED, PREEMPTED], processes.text()
    print(f"left after {time.monotonic() - start:.1f} s")
    (step,) = pod.checkpoints(run)
    assert pod.last_step(run) == step
    for log in processes.logs:
        assert f"preempted: step {step} is saved" in log.read_text()


class Suite:
    """The evaluation of an open vocabulary on Pascal VOC: 12 images, three protocols."""

    ROWS = 3 * 12

    def __init__(self, folder, folders):
        self.folder, self.folders = folder, folders
        official_trees.repeated(folder / "data" / "pascal_voc", "pascal_voc", 12)

    def run(self, name):
        """The folder and the command of a run with weights of its own, all of them alike."""
        changes = {
            "task": "segmentation", "data__root": str(self.folder / "data"), "eval__batch_size": 1,
            "eval__view_size": (32,), "eval__gate_limit": 4, "eval__num_images": 0,
        }  # fmt: skip
        run = self.folder / name / "run"
        command = flags(self.folder / name, self.folders, run, **changes)
        tiny.export(tiny.config(self.folders, **changes), run / "export")
        return run, [*command, "--mode=eval", "--suite=open_vocab"]

    @staticmethod
    def lines(run):
        """Complete lines of the journal; the first one names the run."""
        path = run / "eval" / "journal" / "pascal_voc_1x1.jsonl"
        return path.read_text().splitlines(keepends=True) if path.exists() else []

    def rows(self, run):
        """What was counted, without the times; fails if something was counted twice."""
        (journal,) = (run / "eval" / "journal").iterdir()
        rows = [json.loads(line) for line in self.lines(run)[1:]]
        rows = [row for row in rows if row["key"] != "prompts"]
        assert len(rows) == len({row["key"] for row in rows}) == self.ROWS, journal
        return {row["key"]: {**row["value"], "seconds": 0.0} for row in rows}


@pytest.fixture(scope="module")
def suite(folders, tmp_path_factory):
    return Suite(tmp_path_factory.mktemp("suite"), folders)


@pytest.fixture(scope="module")
def counted(suite):
    """The rows of one process with one device."""
    run, command = suite.run("one")
    pod.Pod(suite.folder / "one", command).check()
    return suite.rows(run)


@pytest.mark.parametrize(
    ("count", "devices"), [(2, 1), pytest.param(2, 4, marks=pytest.mark.slow)], ids=str
)
def test_a_suite_is_shared_by_the_processes(count, devices, suite, counted):
    """The same counts under every protocol as one process finds, in one set of files."""
    run, command = suite.run(f"two{devices}")
    processes = pod.Pod(suite.folder / f"two{devices}", command, count, devices)
    processes.check()
    assert all("of 2; process 0" in log.read_text() for log in processes.logs)
    found = json.loads((run / "eval" / "suite_open_vocab.json").read_text())["rows"]
    (row,) = [row for row in found if "missing" not in row]
    assert row["num_images"] == 12 and {"exhaustive", "gated", "oracle"} == row["protocols"].keys()
    assert suite.rows(run) == counted


def test_sigterm_to_one_of_two_processes_ends_an_evaluation_on_both(suite, counted):
    """Asked to leave between two groups of images, they go on where they were."""
    run, command = suite.run("asked")
    processes = pod.Pod(suite.folder / "asked", command, 2)
    processes.when(lambda: len(suite.lines(run)) > 3)
    processes.processes[1].send_signal(signal.SIGTERM)
    assert processes.wait() == [PREEMPTED, PREEMPTED], processes.text()
    done = suite.lines(run)
    assert 3 < len(done) <= suite.ROWS, "it was over before it was asked to leave"

    pod.Pod(suite.folder / "asked_again", command, 2).check()
    assert suite.lines(run)[: len(done)] == done and suite.rows(run) == counted


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_suite_goes_on_after_one_of_two_processes_was_killed(victim, suite, counted):
    run, command = suite.run(f"killed{victim}")
    processes = pod.Pod(suite.folder / f"killed{victim}", command, 2)
    processes.when(lambda: len(suite.lines(run)) > 3)
    processes.processes[victim].kill()

    # The other one cannot go on alone; what it waits for, a cluster ends in its place.
    with contextlib.suppress(subprocess.TimeoutExpired):
        processes.wait(GRACE)
    processes.kill()
    done = suite.lines(run)
    assert 3 < len(done) <= suite.ROWS, "it was over before it was killed"

    pod.Pod(suite.folder / f"again{victim}", command, 2).check()
    assert suite.lines(run)[: len(done) - 1] == done[:-1]  # the last line may be cut short
    assert suite.rows(run) == counted


@pytest.mark.parametrize("timeout", [2.0, pytest.param(50.0, marks=pytest.mark.slow)])
def test_a_start_that_cannot_succeed_says_why_within_a_minute(timeout, folders, tmp_path):
    """50 s is the default; the time counts from the first line: loading the libraries comes on top."""
    command = flags(tmp_path, folders, tmp_path / "run")
    missing, wrong = pod.free_port(), pod.free_port()
    with socket.create_server(("", 0)) as server:
        taken = server.getsockname()[1]
        cases = {
            f"process 1 of 2 did not come to 127.0.0.1:{missing}": (0, missing, PREEMPTED),
            f"process 0 cannot be reached at 127.0.0.1:{wrong}": (1, wrong, PREEMPTED),
            f"port {taken} is in use": (0, taken, USER_ERROR),
        }
        pods = {
            told: pod.Pod(
                tmp_path / f"case{i}", command, 2, port=port, only=[name], start_timeout=timeout
            )
            for i, (told, (name, port, _)) in enumerate(cases.items())
        }
        for told, processes in pods.items():
            assert processes.wait() == [cases[told][2]], processes.text()
            (line,) = [x for x in processes.text().splitlines() if x.startswith("error: ")]
            assert told in line and processes.said_for() < 120  # a minute, on a busy machine


def test_processes_with_other_settings_are_told_before_the_first_step(folders, tmp_path):
    """Another learning rate would train on, silently wrong; another number of steps would hang."""
    run, port = tmp_path / "run", pod.free_port()
    changes = ({}, {"optim__learning_rate": 0.5, "train__steps": 7})
    pods = [
        pod.Pod(
            tmp_path / f"process{i}", flags(tmp_path / f"process{i}", folders, run, **change), 2,
            port=port, only=[i],
        )
        for i, change in enumerate(changes)
    ]  # fmt: skip
    for processes in pods:
        assert processes.wait() == [USER_ERROR], processes.text()
        (line,) = [x for x in processes.text().splitlines() if x.startswith("error: ")]
        assert "process 1 has config.optim.learning_rate=0.5, process 0 has 0.001" in line
        assert f"process 1 has config.train.steps=7, process 0 has {STEPS}" in line
    assert not run.exists()


@pytest.mark.slow
def test_training_evaluation_export_and_report_on_two_processes(folders, tmp_path):
    """The whole main job of the segmenter; the same counts as on one process."""
    changes = {"task": "segmentation", "train__steps": 2, "eval__num_images": 3}
    for name, count in (("one", 1), ("two", 2)):
        folder = tmp_path / name
        fsdp = {"mesh__fsdp": count, "mesh__data": 1}
        pod.Pod(folder, flags(folder, folders, folder / "run", **changes, **fsdp), count).check()
    results = [
        json.loads((tmp_path / name / "run" / "eval" / "results.json").read_text())
        for name in ("one", "two")
    ]
    counts = [np.asarray(r["confusion"]) for r in results]
    assert counts[0].sum() == counts[1].sum() > 0
    # the images are argmax decisions: a few pixels may fall to the other side
    assert np.abs(counts[0] - counts[1]).sum() <= 0.002 * counts[0].sum()
    run = tmp_path / "two" / "run"
    assert (run / "report" / "index.html").is_file()
    assert len(list((run / "eval" / "gallery").glob("*_image.png"))) == 3
    assert (run / "export" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    # a longer one, left alone, and the same killed and started again
    changes |= {"eval__num_images": 12, "eval__batch_size": 2, "eval__ensemble": 4}
    command = flags(tmp_path / "two", folders, run, **changes, mesh__fsdp=2, mesh__data=1)
    command += ["--mode=eval"]
    pod.Pod(tmp_path / "eval", command, 2).check()
    whole = (run / "eval" / "results.json").read_bytes()
    journal = run / "eval" / "unfinished" / "counts.jsonl"
    killed = pod.Pod(tmp_path / "killed", command, 2)
    killed.when(lambda: journal.exists() and len(journal.read_text().splitlines()) >= 4)
    killed.kill()
    (run / "eval" / "results.json").unlink()
    pod.Pod(tmp_path / "again", command, 2).check()
    assert (run / "eval" / "results.json").read_bytes() == whole
    assert not journal.parent.exists()
