# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints are kept, what a failed save says, and where a run starts."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pod
import pytest
import tiny
from same import assert_same_bits
from toy import ToyTask

from digseg_jax.config.schema import CheckpointConfig
from digseg_jax.errors import PREEMPTED, USER_ERROR, Preempted, Transient, UserError
from digseg_jax.io import checkpoint
from digseg_jax.io.checkpoint import Checkpointer
from digseg_jax.io.metric_writer import read_metrics
from digseg_jax.training import loop

STEPS = 6
SMALL = {"train__steps": STEPS, "optim__learning_rate": 0.1}


@pytest.fixture(autouse=True)
def lines():
    """What the run logs."""
    kept: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: kept.append(record.getMessage())
    log = logging.getLogger("digseg_jax")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield kept
    log.removeHandler(handler)
    log.setLevel(level)


def trainer_of(folders, workdir, task=None, accept_changes=False, **changes):
    config = tiny.config(folders, **(SMALL | changes))
    task = task or ToyTask()
    return tiny.trainer(config, task, tiny.mesh(), workdir, accept_changes=accept_changes)


def train(folders, workdir, on_eval=None, task=None, accept_changes=False, **changes):
    trainer = trainer_of(folders, workdir, task, accept_changes, **changes)
    return trainer, trainer.run(on_eval)


def save_steps(workdir, steps, metrics=None, **options):
    """Checkpoints of a small array at the given steps."""
    with Checkpointer(str(workdir), CheckpointConfig(**options)) as checkpointer:
        for step in steps:
            value = {"x": jax.numpy.full(3, step)}
            checkpointer.save(step, value, {}, (metrics or {}).get(step))
        return checkpointer.best_step()


def test_the_newest_are_kept(tmp_path):
    save_steps(tmp_path, range(1, 8), keep=3)
    assert pod.checkpoints(tmp_path) == [5, 6, 7]


def test_multiples_of_keep_every_are_never_removed(tmp_path):
    save_steps(tmp_path, range(1, 8), keep=1, keep_every=3)
    assert pod.checkpoints(tmp_path) == [3, 6, 7]


def test_the_best_is_kept_too(tmp_path):
    values = {2: {"val_miou": 0.3}, 4: {"val_miou": 0.6}, 6: {"val_miou": 0.5}}
    best = save_steps(tmp_path, range(1, 9), values, keep=1, best="val_miou")
    assert (pod.checkpoints(tmp_path), best) == ([4, 8], 4)
    # a resumed run knows it from the files
    best = save_steps(tmp_path, [9, 10], {10: {"val_miou": 0.7}}, keep=1, best="val_miou")
    assert (pod.checkpoints(tmp_path), best) == ([10], 10)


def test_the_best_weights_can_be_had_after_the_run(cover, folders, tmp_path):
    scores = {1: 0.1, 2: 0.9, 3: 0.5, 4: 0.2, 5: 0.3, 6: 0.4}
    seen = {}

    def on_eval(step, state):
        seen[step] = jax.device_get(state["ema"])
        return {"val_miou": scores[step]}

    changes = {"checkpoint__best": "val_miou", "checkpoint__keep": 1, "logging__eval_every": 1}
    trainer, _ = train(folders, tmp_path, on_eval, **changes)
    assert pod.checkpoints(tmp_path) == [2, 6]
    weights, source = trainer.weights_of(str(tmp_path), best=True)
    assert_same_bits(weights, seen[2])
    assert source == str(tmp_path / "checkpoints" / "2")


class TestStart:
    """Own run > init_from > pretrained > random; one log line says which."""

    @pytest.fixture(scope="class")
    def source(self, cover, folders, tmp_path_factory):
        workdir = tmp_path_factory.mktemp("source")
        return workdir, train(folders, workdir)[1]

    def test_from_another_run(self, source, folders, tmp_path, lines):
        trainer, state = train(folders, tmp_path, init_from=str(source[0]), train__steps=0)
        assert_same_bits(state["params"], source[1]["ema"])
        assert_same_bits(state["ema"], source[1]["ema"])
        assert state["step"] == 0
        starts = [line for line in lines if line.startswith("start:")]
        assert starts == [f"start: step 0, from {source[0] / 'checkpoints' / '6'}"]

    def test_averages_are_taken_where_there_are_some(self, source, folders, tmp_path):
        """Whatever this run keeps: a first run may have saved the memory of an average."""
        _, state = train(
            folders, tmp_path / "a", init_from=str(source[0]), train__steps=0, optim__ema_decay=0.0
        )
        assert_same_bits(state["params"], source[1]["ema"])
        assert "ema" not in state

        _, plain = train(folders, tmp_path / "b", optim__ema_decay=0.0)
        _, state = train(folders, tmp_path / "c", init_from=str(tmp_path / "b"), train__steps=0)
        assert_same_bits(state["params"], plain["params"])
        assert_same_bits(state["ema"], plain["params"])

    def test_the_own_run_comes_first(self, source, folders, tmp_path, lines):
        first = train(folders, tmp_path, checkpoint__every=3)[1]
        again = train(folders, tmp_path, init_from=str(source[0]))[1]
        assert_same_bits(first, again)
        assert lines[-1] == f"start: resumed from {tmp_path / 'checkpoints'} at step 6"

    def test_a_run_without_a_checkpoint_is_refused(self, cover, folders, tmp_path):
        with pytest.raises(UserError, match="no checkpoint here to start from"):
            train(folders, tmp_path / "run", init_from=str(tmp_path / "absent"))
        assert not (tmp_path / "absent").exists()

    def test_a_run_of_another_model_is_refused(self, source, folders, tmp_path):
        class Wider(ToyTask):
            def initial(self):
                return super().initial() | {"kernel": np.full((16, 9), 0.5, np.float32)}

        with pytest.raises(UserError) as caught:
            train(folders, tmp_path, task=Wider(), init_from=str(source[0]))
        assert str(source[0] / "checkpoints" / "6") in tiny.one_line(caught.value)

    def test_another_vocabulary_is_refused_unless_told(self, cover, folders, tmp_path):
        class Speaking(ToyTask):
            prompts = ("water", "forest")

        class Other(ToyTask):
            prompts = ("water", "urban")

        train(folders, tmp_path, task=Speaking(), train__steps=2)
        path = next((tmp_path / "checkpoints" / "2" / "meta").rglob("metadata"))
        assert json.loads(path.read_text())["vocabulary"] == ["water", "forest"]
        with pytest.raises(UserError) as caught:
            train(folders, tmp_path, task=Other())
        message = tiny.one_line(caught.value)
        assert "gone: ['forest'], new: ['urban']" in message and "--accept_changes" in message
        train(folders, tmp_path, task=Other(), accept_changes=True)

    def test_other_training_data_are_refused_unless_told(self, cover, folders, tmp_path, monkeypatch):
        """With one image more, the rest of the run would draw in another order."""
        trainer, _ = train(folders, tmp_path, train__steps=2)
        ((name, (count, *_)),) = trainer.examples.items()
        for before, now, told in (
            ([count, ""], [count + 1, "", ""], f"{name}: {count} examples, now {count + 1}"),
            ([count, "a"], [count, "b", ""], f"{name}: others of other names"),
            ([count, "a", ""], [count, "", "c"], f"{name}: their classes have been counted anew"),
        ):
            monkeypatch.setattr(loop, "training_examples", lambda _, now=now, **__: {name: now})
            with pytest.raises(UserError, match=told):
                trainer_of(folders, tmp_path)._check_examples({name: before})
            trainer_of(folders, tmp_path, accept_changes=True)._check_examples({name: before})
        with pytest.raises(UserError, match="--accept_changes goes on with them"):
            known = {name: [count + 1, "", ""]}
            monkeypatch.setattr(loop, "training_examples", lambda _, **__: known)
            train(folders, tmp_path)
        monkeypatch.undo()
        assert trainer.examples == train(folders, tmp_path)[0].examples


@pytest.mark.parametrize(("overlap", "waits_at"), [(1, 11), (3, 13)])
def test_a_slow_save_holds_up_the_step_that_would_be_lost_too(overlap, waits_at, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "OVERLAP", overlap)
    with Checkpointer(str(tmp_path), CheckpointConfig()) as checkpointer:
        checkpointer.save(10, {"x": np.zeros(3, np.float32)}, {})
        asked = []

        def is_saving():  # the third time that one step asks
            asked.append(step)
            return asked.count(step) < 3

        monkeypatch.setattr(checkpointer.manager, "is_saving_in_progress", is_saving)
        for step in range(11, 15):
            checkpointer.check(step)
        waited = [step for step in set(asked) if asked.count(step) == 3]
        assert waited == [waits_at]
        monkeypatch.undo()


@pytest.mark.parametrize("waits", [False, True], ids=["beside a step", "at the end"])
def test_a_save_that_hangs_ends_the_run_in_time_and_may_be_tried_again(tmp_path, monkeypatch, waits):
    save_steps(tmp_path, [5])
    with Checkpointer(str(tmp_path), CheckpointConfig()) as checkpointer:
        checkpointer.save(10, {"x": np.zeros(3, np.float32)}, {})
        monkeypatch.setattr(checkpointer.manager, "is_saving_in_progress", lambda: True)
        checkpointer.config = CheckpointConfig(timeout=0.2)
        time.sleep(0 if waits else 0.3)
        with pytest.raises(Transient) as caught:
            checkpointer.wait() if waits else checkpointer.check(10)
        message = tiny.one_line(caught.value)
        assert message.startswith(f"{tmp_path / 'checkpoints' / '10'}: checkpoint cannot be written")
        assert "(not written after 0 s); of the older ones those of steps 5 are whole" in message
        monkeypatch.undo()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_sigterm_or_ctrl_c_saves_the_step_and_leaves(cover, folders, tmp_path, sent):
    """One process: the signal may come at any moment of a step."""
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]

    def on_eval(step, state):
        if step == 3:
            os.kill(os.getpid(), sent)
        return {}

    changes = {"logging__eval_every": 1, "checkpoint__every": 100}
    with pytest.raises(Preempted, match="step 3 is saved"):
        train(folders, tmp_path, on_eval, **changes)
    assert pod.checkpoints(tmp_path) == [3]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
    expected = train(folders, tmp_path / "whole")[1]
    assert_same_bits(train(folders, tmp_path)[1], expected)


def test_a_second_ctrl_c_leaves_at_once(cover, folders, tmp_path):
    def on_eval(step, state):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        return {}

    with pytest.raises(KeyboardInterrupt):
        train(folders, tmp_path, on_eval, logging__eval_every=3, checkpoint__every=100)
    assert pod.checkpoints(tmp_path) == []


def test_sigterm_at_the_last_step_is_no_preemption(cover, folders, tmp_path):
    def on_eval(step, state):
        if step == STEPS:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    train(folders, tmp_path, on_eval, logging__eval_every=1)
    assert pod.checkpoints(tmp_path)[-1] == STEPS


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_main_ends_with_the_documented_status_after_a_signal(cover, folders, tmp_path, sent):
    config = tiny.config_file(tmp_path, folders, task="prior", train__steps=100000, loading__workers=1)
    flags = [f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    process = pod.Pod(tmp_path / "logs", flags)
    process.when(lambda: pod.last_step(tmp_path / "run") >= 2)
    process.kill(sent)
    assert process.wait() == [PREEMPTED]
    assert "Traceback" not in process.text()
    assert pod.checkpoints(tmp_path / "run")[-1] == pod.last_step(tmp_path / "run")


def test_a_disk_that_refuses_ends_the_run_loudly_and_older_checkpoints_stay(cover, folders, tmp_path):
    """After the second checkpoint, files of the process may no longer grow beyond 64 kB (EFBIG)."""
    run = tmp_path / "run"
    config = tiny.config_file(
        tmp_path, folders, task="prior", train__steps=100000, checkpoint__every=10,
        logging__every=1000,
    )  # fmt: skip
    process = pod.Pod(tmp_path / "logs", [f"--config={config}", f"--workdir={run}"])
    process.when(lambda: len(pod.checkpoints(run)) >= 2)
    resource.prlimit(process.processes[0].pid, resource.RLIMIT_FSIZE, (65536, 65536))
    assert process.wait() == [USER_ERROR], process.text()
    (line,) = [x for x in process.logs[0].read_text().splitlines() if x.startswith("error: ")]
    kept = pod.checkpoints(run)
    assert "checkpoint cannot be written" in line and str(run / "checkpoints") in line
    assert f"those of steps {', '.join(map(str, kept))} are whole" in line
    again = pod.Pod(tmp_path / "again", [f"--config={config}", f"--workdir={run}"])
    again.when(lambda: pod.checkpoints(run)[-1] > kept[-1])
    again.kill()
    assert f"resumed from {run / 'checkpoints'} at step {kept[-1]}" in again.text()


def test_a_directory_that_cannot_be_written_is_told_by_main(tmp_path, folders):
    (tmp_path / "file").write_text("")
    config = tiny.config_file(tmp_path, folders)
    workdir = tmp_path / "file" / "run"
    command = [sys.executable, "-m", "digseg_jax.main", f"--config={config}", f"--workdir={workdir}"]
    done = subprocess.run(command, cwd=pod.ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == USER_ERROR
    assert done.stderr.splitlines()[-1].startswith(f"error: --workdir={workdir}")
