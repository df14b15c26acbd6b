# SPDX-License-Identifier: Apache-2.0
"""What the metric writer and the progress line promise."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from tensorboardX import event_file_writer

from digseg_jax.errors import UserError
from digseg_jax.io.metric_writer import MetricWriter, read_metrics
from digseg_jax.io.progress import Progress, format_duration


def steps(path):
    return [row["step"] for row in read_metrics(path)]


def write_steps(workdir, numbers, **options):
    with MetricWriter(workdir, active=True, **options) as writer:
        for step in numbers:
            writer.write(step, {"loss": 1.0 / (step + 1)})
    return workdir / "metrics.jsonl"


def test_each_write_is_one_json_line_that_is_on_disk_at_once(tmp_path):
    with MetricWriter(tmp_path, active=True) as writer:
        writer.write(1, {"loss": 0.5, "images_per_second": np.float32(38.25)})
        text = (tmp_path / "metrics.jsonl").read_text()
        assert text == '{"step": 1, "loss": 0.5, "images_per_second": 38.25}\n'
        writer.write(np.int64(2), {"loss": np.asarray(0.25), "images": 7})
    assert read_metrics(tmp_path / "metrics.jsonl")[1] == {"step": 2, "loss": 0.25, "images": 7}


FAKE_WANDB = """
import json, pathlib
calls = pathlib.Path(__file__).with_name("calls.jsonl")

def note(*call):
    with calls.open("a") as file:
        file.write(json.dumps(call) + "\\n")

class Run:
    def log(self, values, step):
        note("log", values, step)

    def finish(self):
        note("finish")

def init(**options):
    note("init", options)
    return Run()
"""


class TestWandb:
    @pytest.fixture
    def calls(self, tmp_path, monkeypatch):
        folder = tmp_path / "packages"
        folder.mkdir()
        (folder / "wandb.py").write_text(FAKE_WANDB)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, "wandb", raising=False)
        yield lambda: [json.loads(x) for x in (folder / "calls.jsonl").read_text().splitlines()]
        sys.modules.pop("wandb", None)

    def test_a_named_project_gets_what_the_file_gets(self, tmp_path, calls):
        with MetricWriter(tmp_path / "run", active=True, wandb="land") as writer:
            writer.write(3, {"loss": 0.5, "bad": float("nan")})
        start, row, end = calls()
        assert start[1]["project"] == "land" and start[1]["resume"] == "allow"
        assert row == ["log", {"loss": 0.5}, 3] and end == ["finish"]

    def test_a_resumed_directory_goes_on_with_the_same_run(self, tmp_path, calls):
        for folder in ("a", "a", "b"):
            MetricWriter(tmp_path / folder, active=True, wandb="land").close()
        first, second, other = (call[1]["id"] for call in calls() if call[0] == "init")
        assert first == second != other

    def test_a_missing_package_is_one_clear_error(self, tmp_path, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(UserError, match="config.logging.wandb='land'.*pip install wandb"):
            MetricWriter(tmp_path, active=True, wandb="land")

    def test_it_is_imported_only_if_asked_for(self, tmp_path, calls):
        MetricWriter(tmp_path, active=True).close()
        assert "wandb" not in sys.modules


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -np.inf, np.float32("nan")])
def test_a_value_that_is_not_finite_becomes_null(tmp_path, value):
    with MetricWriter(tmp_path, active=True) as writer:
        writer.write(3, {"loss": value})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 3, "loss": None}


def test_resume_drops_the_lines_after_the_restored_step(tmp_path):
    path = write_steps(tmp_path, range(1, 8))
    write_steps(tmp_path, range(5, 11), truncate_after=4)
    assert steps(path) == list(range(1, 11))
    assert not list(tmp_path.glob("*.tmp"))


def test_resume_before_the_first_line_keeps_none(tmp_path):
    path = write_steps(tmp_path, range(3))
    write_steps(tmp_path, range(2), truncate_after=-1)
    assert steps(path) == [0, 1]


def test_without_truncation_lines_are_appended(tmp_path):
    write_steps(tmp_path, [1, 2])
    assert steps(write_steps(tmp_path, [3])) == [1, 2, 3]


@pytest.mark.parametrize("half", ['{"step": 3, "lo', '{"step": 3', "\x00\x00", "{"])
def test_a_half_written_last_line_is_left_out_and_mended(tmp_path, half):
    path = write_steps(tmp_path, [1, 2])
    with path.open("a") as file:
        file.write(half)
    assert steps(path) == [1, 2]
    write_steps(tmp_path, [3])
    assert steps(path) == [1, 2, 3]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_whole_last_line_without_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}')
    assert steps(write_steps(tmp_path, [2])) == [1, 2]


@pytest.mark.parametrize(
    "bad",
    ["oops", "[1]", '{"loss": 1}', '{"step": "1"}', pytest.param("[" * 100_000, id="deep")],
)
def test_a_bad_line_elsewhere_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.jsonl"):
        read_metrics(tmp_path / "absent.jsonl")


def test_a_metric_may_not_be_called_step(tmp_path):
    with MetricWriter(tmp_path, active=True) as writer, pytest.raises(UserError, match="'step'"):
        writer.write(1, {"step": 2.0})


def test_other_processes_write_nothing(tmp_path):
    with MetricWriter(tmp_path / "run", active=False) as writer:
        writer.write(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_every_finite_scalar(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    with MetricWriter(tmp_path, active=True) as writer:
        writer.write(5, {"loss": 0.5, "broken": float("nan")})
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, found, at = file.read_bytes(), [], 0
    while at < len(data):  # a record: length (8 bytes), checksum (4), payload, checksum (4)
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        at += size + 16
    assert found == [(5, "loss", 0.5)]


@pytest.mark.parametrize("fails", ["__init__", "write_event", "flush", "close"])
def test_a_disk_that_refuses_events_is_one_warning_and_the_record_goes_on(
    tmp_path, monkeypatch, caplog, fails
):
    """Whatever the copy for a viewer meets: the run must neither end nor hang for it."""

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(event_file_writer.EventsWriter, fails, refuse)
    with MetricWriter(tmp_path, active=True) as writer:
        for step in range(1, 40):
            writer.write(step, {"loss": 0.5})
        writer.sync()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 39
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path / 'tensorboard'}: no more events for TensorBoard (No space left on device)"
    ]


def test_neither_tensorflow_nor_torch_is_imported(tmp_path):
    code = f"""
        import sys
        from digseg_jax.io.metric_writer import MetricWriter
        with MetricWriter({str(tmp_path)!r}, active=True) as writer:
            writer.write(1, {{"loss": 1.0}})
        assert not {{"tensorflow", "torch"}} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_the_line_names_step_values_rate_and_time_left():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(1000, every=0, stream=stream, active=True, clock=clock)
    progress.update(20, loss=1.0)
    clock.now = 20.0
    progress.update(120, rate=38.21, loss=0.01234)
    first, second = stream.getvalue().splitlines()
    assert first == "step 20/1000  loss 1  ETA -:--"
    assert second == "step 120/1000  loss 0.01234  38.2 images/s  ETA 2:56"


def test_without_a_terminal_lines_are_rare_and_the_last_is_shown():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(100, every=10, stream=stream, active=True, clock=clock)
    for step in range(1, 101):
        clock.now = step * 0.25
        progress.update(step)
    progress.close()
    shown = [line.split()[1] for line in stream.getvalue().splitlines()]
    assert shown == ["1/100", "41/100", "81/100", "100/100"]
    assert "\r" not in stream.getvalue()


def test_on_a_terminal_the_line_is_redrawn_in_place():
    stream, clock = Terminal(), Clock()
    progress = Progress(3, stream=stream, active=True, clock=clock)
    for step in (1, 2, 3):
        clock.now += 1
        progress.update(step)
    progress.close()
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("step 3/3  ETA 0:00\x1b[K\n")
    assert text.count("\r") == 3


def test_a_session_that_was_closed_does_not_end_the_run():
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    progress = Progress(3, every=0, stream=Closed(), active=True)
    for step in (1, 2, 3):
        progress.update(step)
    progress.clear()
    progress.close()


def test_an_inactive_process_shows_nothing():
    stream = Terminal()
    progress = Progress(3, stream=stream, active=False)
    progress.update(1)
    progress.close()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (151, "2:31"), (59.6, "1:00"), (3751, "1:02:31"), (float("inf"), "-:--")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
