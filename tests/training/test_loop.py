# SPDX-License-Identifier: Apache-2.0
"""The training loop: where it stops it goes on, to the same bits, and each step is logged once."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from same import assert_same_bits
from toy import ToyTask

from digseg_jax.errors import USER_ERROR, UserError
from digseg_jax.io.metric_writer import read_metrics
from digseg_jax.prediction.description import unet_folder
from digseg_jax.runtime import sharding
from digseg_jax.runtime.door import tell
from digseg_jax.tools.replay import replay
from digseg_jax.training.failure import load_failure
from digseg_jax.training.tasks.shares import part_losses
from digseg_jax.training.train_log import NotFinite

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("cover")
STEPS = 6


class Stopped(Exception):
    """Stands in for whatever ends a process."""


@pytest.fixture(scope="module")
def config(folders):
    return tiny.config(folders, train__steps=STEPS, optim__learning_rate=0.1)


def trainer(config, workdir, task=None, mesh=None):
    return tiny.trainer(config, task or ToyTask(), mesh or tiny.mesh(), workdir)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """An uninterrupted run: its directory and final state."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, jax.device_get(trainer(config, workdir).run())


def stop_at(step, folders, workdir, **changes):
    """Runs until just after `step`, then dies."""

    def on_eval(now, state):
        if now == step:
            raise Stopped
        return {}

    every_step = tiny.config(
        folders, train__steps=STEPS, optim__learning_rate=0.1, logging__eval_every=1, **changes
    )
    with pytest.raises(Stopped):
        trainer(every_step, workdir).run(on_eval)


@pytest.mark.parametrize("step", [1, 3, 4, 5])
def test_a_run_that_stopped_ends_with_the_same_bits(step, config, folders, whole, tmp_path):
    """Before the first checkpoint, between two, right after one."""
    stop_at(step, folders, tmp_path)
    assert_same_bits(trainer(config, tmp_path).run(), whole[1])
    rows, expected = (read_metrics(d / "metrics.jsonl") for d in (tmp_path, whole[0]))
    assert [r["step"] for r in rows] == list(range(1, STEPS + 1))
    assert [r["loss"] for r in rows] == [r["loss"] for r in expected]


class MixedTask(ToyTask):
    """A task that also logs the losses of a mixture's parts."""

    def loss(self, params, frozen, batch, keys, whole=None):
        loss, metrics = super().loss(params, frozen, batch, keys)
        squared = jnp.square(batch["image"].reshape(len(batch["part"]), -1) / 255.0)
        valid = jnp.ones(squared.shape, bool)
        asked = (batch["query"] * 1e-3).mean()  # whatever is asked changes the state
        return loss * (1 + asked), metrics | part_losses(squared, valid, batch["part"], ("a", "b"))


def test_a_stopped_mixture_ends_with_the_same_bits_and_the_same_losses_by_part(folders, tmp_path):
    parts = (
        {"name": "landcover", "group": "land", "weight": 2.0},
        {"name": "landcover_igbp", "group": "igbp", "short_side": 64, "quarter_turns": True},
    )
    options = {"data__mixture": parts, "data__foreign_rate": 0.5, "data__negative_rate": 0.4}
    config = tiny.config(folders, train__steps=STEPS, optim__learning_rate=0.1, **options)
    expected = trainer(config, tmp_path / "whole", MixedTask()).run()

    def on_eval(step, state):
        if step == 3:
            raise Stopped
        return {}

    stopping = dataclasses.replace(config, logging=dataclasses.replace(config.logging, eval_every=1))
    with pytest.raises(Stopped):
        trainer(stopping, tmp_path / "stopped", MixedTask()).run(on_eval)
    assert_same_bits(trainer(config, tmp_path / "stopped", MixedTask()).run(), expected)
    rows, whole = (read_metrics(tmp_path / d / "metrics.jsonl") for d in ("stopped", "whole"))
    keys = ("loss", "loss/a", "loss/b", "share/a", "share/b")
    assert [[r[k] for k in keys if k in r] for r in rows] == [
        [r[k] for k in keys if k in r] for r in whole
    ]
    assert np.mean([r["share/a"] for r in rows]) == pytest.approx(2 / 3, abs=0.05)


def test_it_learns_and_the_average_follows(config, whole):
    start = ToyTask().initial()
    state = whole[1]
    assert state["step"] == STEPS
    assert not np.array_equal(state["params"]["kernel"], start["kernel"])
    distance = [abs(state[k]["kernel"] - start["kernel"]).mean() for k in ("ema", "params")]
    assert 0 < distance[0] < distance[1]


def test_each_line_of_the_metrics_has_what_readers_rely_on(whole):
    rows = read_metrics(whole[0] / "metrics.jsonl")
    for row in rows:
        names = {"step", "loss", "images_per_second", "grad_norm", "learning_rate", "spread"}
        assert row.keys() >= names
        assert row["images_per_second"] > 0
        assert "mfu" not in row  # a CPU has no stated peak
        shares = [row[f"time_{name}"] for name in ("data", "step", "checkpoint", "eval")]
        assert min(shares) >= 0 and sum(shares) == pytest.approx(1.0)
    assert any(row["time_checkpoint"] > 0 for row in rows[2:])


def test_a_line_is_the_mean_of_the_steps_since_the_last(folders, whole, tmp_path):
    config = tiny.config(folders, train__steps=STEPS, optim__learning_rate=0.1, logging__every=4)
    trainer(config, tmp_path).run()
    each = {r["step"]: r["loss"] for r in read_metrics(whole[0] / "metrics.jsonl")}
    rows = {r["step"]: r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl")}
    assert rows == {
        4: pytest.approx(np.mean([each[s] for s in (1, 2, 3, 4)])),
        6: pytest.approx(np.mean([each[s] for s in (5, 6)])),
    }


def test_what_the_evaluation_returns_is_logged_at_its_step(folders, tmp_path):
    config = tiny.config(folders, train__steps=4, logging__eval_every=2, logging__every=100)
    trainer(config, tmp_path).run(lambda step, state: {"val_miou": step / 10})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["val_miou"]) for r in rows] == [(2, 0.2), (4, 0.4)]


def test_a_finished_run_is_left_as_it_is(config, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert_same_bits(trainer(config, tmp_path / "run").run(), whole[1])
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_checkpoints_lie_where_they_should_and_only_the_newest_are_kept(whole):
    folder = whole[0] / "checkpoints"
    assert sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) == [4, 6]
    assert (folder / "6" / "state").is_dir()
    assert json.loads(next((folder / "6" / "data").rglob("metadata")).read_text()) == {"next_step": 6}
    meta = json.loads(next((folder / "6" / "meta").rglob("metadata")).read_text())
    assert meta["config"]["train"]["steps"] == STEPS and "jax" in meta["versions"]


def test_a_run_may_go_on_with_another_mesh(folders, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 8)
    stop_at(5, folders, tmp_path)
    config = tiny.config(folders, train__steps=STEPS, optim__learning_rate=0.1)
    state = trainer(config, tmp_path, mesh=tiny.mesh(data=2, fsdp=4)).run()
    assert "fsdp" in str(state["params"]["kernel"].sharding.spec)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(whole[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_training_does_not_write_into_the_initial_parameters(config, tmp_path):
    """The state is donated; on a CPU its buffers may be the very memory of the NumPy arrays."""
    params = ToyTask().initial()

    class Keeping(ToyTask):
        def initial(self):
            return params

    trainer(config, tmp_path, Keeping()).run()
    assert_same_bits(params, ToyTask().initial())


def test_a_batch_that_does_not_divide_among_the_devices_is_refused(folders, tmp_path):
    config = tiny.config(folders, train__batch_size=6)
    with pytest.raises(UserError) as caught:
        trainer(config, tmp_path, mesh=tiny.mesh(data=2, fsdp=2)).run()
    assert "config.train.batch_size=6" in tiny.one_line(caught.value)
    assert "multiple of 4" in str(caught.value)


def test_a_loss_that_is_no_number_ends_the_run_at_its_step(config, tmp_path):
    class Exploding(ToyTask):
        def loss(self, params, frozen, batch, keys):
            loss, metrics = super().loss(params, frozen, batch, keys)
            return jnp.where(batch["index"].max() >= 16, jnp.nan, loss), metrics

    with pytest.raises(NotFinite, match="at step 3"):
        trainer(config, tmp_path, Exploding()).run()
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")][:2] == [1, 2]


class Poisoned(ToyTask):
    """Example 19 of the stream, which is in step 3, gives no number."""

    def loss(self, params, frozen, batch, keys):
        loss, metrics = super().loss(params, frozen, batch, keys)
        return loss * jnp.where((batch["index"] == 19).any(), jnp.nan, 1.0), metrics


@pytest.fixture(scope="module")
def stopped(folders, tmp_path_factory):
    """It logs only at the end, so that it is the checkpoint at step 4 that looks first."""
    workdir = tmp_path_factory.mktemp("poisoned")
    config = tiny.config(folders, train__steps=STEPS, optim__learning_rate=0.1, logging__every=100)
    with pytest.raises(NotFinite, match="loss nan, grad_norm nan at step 3") as caught:
        trainer(config, workdir, Poisoned()).run()
    line = tiny.one_line(caught.value)
    assert f"step 2 is saved in {workdir}/checkpoints, the batch in {workdir}/failure/3; repeat" in line
    assert "a lower config.optim.learning_rate (now 0.1)" in line
    assert tell(caught.value) == USER_ERROR  # no traceback; the launchers do not start it again
    return config, workdir


class TestNotFinite:
    """The guard: stops with the step, writes no bad checkpoint, and the step can be repeated."""

    def test_the_state_after_it_is_not_saved(self, stopped):
        folder = stopped[1] / "checkpoints"
        assert [p.name for p in folder.iterdir() if p.name.isdigit()] == ["2"]
        assert [(r["step"], r["loss"]) for r in read_metrics(stopped[1] / "metrics.jsonl")] == [
            (3, None)
        ]

    def test_what_is_needed_to_repeat_it_is(self, stopped):
        failure, batch = load_failure(str(stopped[1]))
        assert failure["step"] == 3 and failure["checkpoint"] == 2 and failure["seed"] == 0
        assert failure["metrics"]["loss"] == "nan"
        assert list(batch["index"]) == list(range(16, 24)) and batch["image"].dtype == np.uint8

    def test_rows_that_two_processes_were_fed_count_once(self, stopped, tmp_path):
        shutil.copytree(stopped[1], tmp_path / "run")
        folder = tmp_path / "run" / "failure" / "3"
        shutil.copy(folder / "batch_0.npz", folder / "batch_1.npz")
        record = json.loads((folder / "failure.json").read_text())
        (folder / "failure.json").write_text(json.dumps(record | {"processes": 2}))
        _, batch = load_failure(str(tmp_path / "run"))
        assert list(batch["index"]) == list(range(16, 24))
        (folder / "batch_1.npz").unlink()
        with pytest.raises(UserError, match="batch_1.npz: missing.*process 1"):
            load_failure(str(tmp_path / "run"))

    def test_the_replay_names_the_example_and_the_gradients(self, stopped):
        config, workdir = stopped
        report = replay(str(workdir), trainer(config, workdir, Poisoned()))
        assert report["step"] == 3 and report["from_checkpoint"] == 2
        assert [i for i, loss in report["example_losses"].items() if loss == "nan"] == [19]
        assert report["parameters_not_finite"] == []
        assert report["gradients_not_finite"] == ["bias", "kernel"]

    def test_a_run_that_has_gone_on_is_not_replayed(self, stopped, tmp_path):
        config, workdir = stopped
        shutil.copytree(workdir, tmp_path / "run")
        trainer(config, tmp_path / "run").run()
        with pytest.raises(UserError, match="gone on to step 6"):
            replay(str(tmp_path / "run"), trainer(config, tmp_path / "run"))

    @pytest.mark.slow
    def test_the_commands(self, folders, tmp_path):
        """A learning rate without sense: the second step has no finite loss."""
        options = {"task": "prior", "train__batch_size": 2, "optim__learning_rate": 1e30}
        config_file = tiny.config_file(tmp_path, folders, **options)
        workdir = tmp_path / "run"
        command = TestKill.command(config_file, workdir)
        failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert failed.returncode == USER_ERROR and "Traceback" not in failed.stderr
        assert "no step is saved, the batch in" in failed.stderr
        again = f"python -m digseg_jax.tools.replay --workdir={workdir}"
        assert "at step 2" in failed.stderr and again in failed.stderr
        command = [sys.executable, *again.split()[1:]]
        replayed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert replayed.returncode == 0, replayed.stderr[-3000:]
        report = json.loads(replayed.stdout)
        assert report["step"] == 2 and report["from_checkpoint"] == 0
        assert set(report["example_losses"]) == {"2", "3"}
        assert report["gradients_not_finite"]

    def test_nothing_to_replay_is_one_clear_error(self, tmp_path):
        with pytest.raises(UserError, match="no failed step"):
            load_failure(str(tmp_path))


def test_a_profile_of_the_named_steps_is_written(folders, tmp_path):
    config = tiny.config(folders, train__steps=3, logging__profile=(2, 2))
    trainer(config, tmp_path).run()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def damage(folder: Path, how: str) -> None:
    files = [p for p in (folder / "state").rglob("*") if p.is_file()]
    assert files
    if how == "state removed":
        shutil.rmtree(folder / "state")
    elif how == "data removed":
        shutil.rmtree(folder / "data")
    for file in files:
        if how == "files emptied":
            file.write_bytes(b"")
        elif how == "files cut in half":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        elif how == "files overwritten":
            file.write_bytes(os.urandom(file.stat().st_size))


DAMAGES = ["state removed", "data removed", "files emptied", "files cut in half", "files overwritten"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_one_clear_error_that_names_it(how, config, whole, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole[0], workdir)
    damage(workdir / "checkpoints" / "6", how)
    with pytest.raises(UserError) as caught:
        trainer(config, workdir).run()
    message = tiny.one_line(caught.value)
    assert message.startswith(f"{workdir / 'checkpoints' / '6'}: checkpoint cannot be read")
    assert "go back to step 4" in message


def test_going_back_to_the_earlier_checkpoint_works_as_the_error_says(config, whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    assert_same_bits(trainer(config, tmp_path / "run").run(), whole[1])


def test_a_checkpoint_of_another_model_is_refused(config, whole, tmp_path):
    class Wider(ToyTask):
        def initial(self):
            return super().initial() | {"kernel": np.full((16, 9), 0.5, np.float32)}

    shutil.copytree(whole[0], tmp_path / "run")
    with pytest.raises(UserError) as caught:
        trainer(config, tmp_path / "run", Wider()).run()
    assert "checkpoints" in tiny.one_line(caught.value)


class TestKill:
    """kill -9 of a real process at a random moment, then the same command again."""

    @staticmethod
    def command(config_file: Path, workdir: Path) -> list[str]:
        flags = [f"--config={config_file}", f"--workdir={workdir}"]
        return [sys.executable, "-m", "digseg_jax.main", *flags]

    def finish(self, config_file: Path, workdir: Path) -> None:
        command = self.command(config_file, workdir)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]

    def kill(self, config_file: Path, workdir: Path, after: int) -> None:
        """Kills the process as soon as step `after` is logged."""
        process = subprocess.Popen(
            self.command(config_file, workdir),
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        end = time.monotonic() + 900
        try:
            while process.poll() is None and last_step(workdir) < after and time.monotonic() < end:
                time.sleep(0.01)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"

    def check(self, folders, folder: Path, kills: int, **changes) -> None:
        steps = 15  # a checkpoint takes longer than five of these steps
        changes = {"train__steps": steps, "checkpoint__every": 5, **changes}
        config_file = tiny.config_file(folder, folders, **changes)
        whole, killed = folder / "whole", folder / "killed"
        self.finish(config_file, whole)
        moments = sorted(random.SystemRandom().sample(range(1, steps - 5), kills))
        print(f"killed after steps {moments}")  # shown if the test fails
        for after in moments:
            self.kill(config_file, killed, after)
        self.finish(config_file, killed)
        name = "diffusion_pytorch_model.safetensors"
        a, b = (load_file(unet_folder(d / "export") / name) for d in (whole, killed))
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
        rows = [read_metrics(d / "metrics.jsonl") for d in (whole, killed)]
        assert [r["step"] for r in rows[1]] == list(range(1, steps + 1))
        assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]]

    def test_the_exported_weights_have_the_same_bits(self, folders, tmp_path):
        self.check(folders, tmp_path, kills=1, task="prior", train__batch_size=2)

    @pytest.mark.slow
    def test_three_kills_of_the_main_job_evaluation_included(self, folders, tmp_path):
        self.check(folders, tmp_path, kills=3)
        results = [json.loads((tmp_path / d / "eval" / "results.json").read_text())
                   for d in ("whole", "killed")]  # fmt: skip
        assert results[0]["confusion"] == results[1]["confusion"]
        assert (tmp_path / "killed" / "report" / "index.html").is_file()


def last_step(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return rows[-1]["step"] if rows else 0
