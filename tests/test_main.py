# SPDX-License-Identifier: Apache-2.0
"""The command line: what is wrong is told in one line, with a status, and without a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import pytest
import tiny
from PIL import Image

from digseg_jax import main
from digseg_jax.errors import INTERRUPTED, Preempted, UserError, lacks_memory

ROOT = Path(__file__).parents[1]
QUICKSTART = "--config=configs/quickstart.py"


def run(*arguments: str, timeout: float = 240) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "digseg_jax.main", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def refused(*arguments: str) -> str:
    """Our own refusals: status 2 and `error: ...` as the one line."""
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: ")
    return done.stderr


@pytest.fixture
def workdir(tmp_path) -> str:
    return f"--workdir={tmp_path / 'run'}"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--config.train.stepz=3", "config.train.stepz: no such key; did you mean 'steps'"),
        ("--config.trian.steps=3", "config.trian: no such key; did you mean 'train'"),
        ("--config.task=segment", "config.task='segment': legal values are segmentation, prior"),
        ("--config.eval.sweep=('4by2',)", "E-Step '4by2'"),
    ],
)
def test_a_wrong_key_or_value_is_named_and_nothing_is_made(override, expected, workdir):
    message = refused(QUICKSTART, override, workdir)
    assert expected in message
    assert not Path(workdir.split("=")[1]).exists()


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["--mode=train"], "--config"),
        (["--mode=eval", "--model=assets:segmenter"], "--workdir"),
        ([QUICKSTART], "--workdir"),
        ([QUICKSTART, "--workdir= "], "--workdir"),
        ([QUICKSTART, "--mode=eval"], "--workdir"),
        ([QUICKSTART, "--mode=cache_latents"], "--config.data.latent_cache"),
        ([QUICKSTART, "--mode=predict", "--query=snow"], "--image"),
        ([QUICKSTART, "--mode=predict", "--image=a.png"], "--query"),
    ],
)
def test_a_missing_flag_is_named(arguments, missing):
    assert f"needs {missing}" in refused(*arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--image=a.png"], "--image: for --mode=predict only, not --mode=train"),
        (["--mode=export", "--sampling=8x2"], "--sampling: for --mode=eval or predict or demo only"),
        (["--template={}"], "--template: for --mode=predict or demo or eval only"),
        (["--suite=semantic"], "--suite: for --mode=eval only"),
        (["--mode=eval", "--topology=cpu:2"], "--topology: for --mode=compile only"),
        (["--mode=predict", "--process_id=1"], "--process_id: for --mode=train or eval or export or"),
        (["--mode=cache_latents"], "--workdir: for --mode=train or eval or export or predict or"),
    ],
)
def test_a_flag_that_the_mode_does_not_use_is_refused(arguments, expected, workdir):
    assert expected in refused(QUICKSTART, workdir, *arguments)


def test_a_suite_calibrates_nothing_so_a_file_may_fit_on_the_split_that_it_scores(workdir):
    arguments = [QUICKSTART, workdir, "--mode=eval", "--config.eval.split=val"]
    assert "calibrat" in refused(*arguments)
    assert "no trained weights" in refused(*arguments, "--suite=domains")


def test_a_missing_config_file_is_named(workdir):
    assert "nowhere.py" in refused("--config=nowhere.py", workdir)


def test_a_config_file_that_sets_an_unknown_key_is_told_so(tmp_path, workdir):
    file = tmp_path / "experiment.py"
    file.write_text(
        "from digseg_jax.config import default\n\n\ndef get_config():\n"
        "    config = default()\n    config.train.stepz = 3\n    return config\n"
    )
    message = refused(f"--config={file}", workdir)
    assert "stepz" in message and "steps" in message


@pytest.mark.parametrize(
    "line", ["from digseg_jax.config import defaults", "import no", "def get(", "exit(0)"]
)
def test_a_config_file_that_cannot_be_imported_is_told_in_one_line(tmp_path, workdir, line):
    (tmp_path / "experiment.py").write_text(f"{line}\n")
    message = refused(f"--config={tmp_path / 'experiment.py'}", workdir)
    assert message.startswith("error: --config: ")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([QUICKSTART, "--mode=trian"], "one of <train|eval|export|predict|demo|compile|cache_latents>"),
        ([QUICKSTART, "--wrokdir=x"], "Did you mean: workdir"),
        ([QUICKSTART, "--workdir=other"], "--workdir: given twice, --workdir=other and --workdir="),
        ([QUICKSTART, "--config.train.steps=many"], "--config.train.steps=many"),
        (["--config=configs/camvid.py:sd3"], "no version 'sd3'"),
    ],
)
def test_a_wrong_flag_is_one_line(arguments, expected, workdir):
    assert expected in refused(*arguments, workdir)


def test_negative_numbers_after_a_space_are_values_not_flags_given_twice():
    main._check_repeats(["main", "--config.mesh.data", "-1", "--config.compile.effort", "-1"])
    main._check_repeats(["main", "--query", "-x", "--query", "-x"])


def test_a_word_that_is_no_flag_is_told(workdir):
    assert "unexpected argument 'extra'" in refused(QUICKSTART, "extra", workdir)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_no_failure(flag):
    done = run(flag)
    assert done.returncode == 0 and "--workdir" in done.stdout and done.stderr == ""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, 0),
        (RuntimeError("a bug"), 1),
        (UserError("a wrong flag"), 2),
        (MemoryError(), 3),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), 3),
        (Preempted("step 3 is saved"), 75),
        (KeyboardInterrupt(), 130),
    ],
)
def test_what_a_mode_raises_becomes_its_exit_status(error, status, monkeypatch, capsys):
    left = []
    monkeypatch.setattr(main, "run", mock.Mock(side_effect=error))
    monkeypatch.setattr(main, "_leave", left.append)
    monkeypatch.setattr(main, "setup", lambda: None)
    main.main(["digseg"])
    assert (left or [0])[0] == status
    told = capsys.readouterr().err
    assert ("Traceback" in told) == (status in (1, 3))


def test_a_device_without_memory_says_so_in_words_that_are_understood():
    """The real error of the library, not a made-up one."""
    with pytest.raises(Exception) as caught:  # noqa: B017 - the library's own class
        jnp.zeros(2**60, jnp.float32).block_until_ready()
    assert lacks_memory(caught.value)
    assert not lacks_memory(ValueError("shapes differ"))


def test_windows_is_told_where_it_runs(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with mock.patch.object(main, "_fail", side_effect=UserError) as told, pytest.raises(UserError):
        main.parse_flags(["digseg", "demo"])
    (line,) = told.call_args.args
    assert "inside WSL2" in line


class TestTheCommand:
    """`digseg`, as pip installs it: the same as python -m digseg_jax.main, from any folder."""

    def run(self, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
        scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
        module, _, function = scripts["digseg"].partition(":")
        code = f"from {module} import {function}; {function}()"
        command = [sys.executable, "-c", code, *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240
        )

    def test_it_knows_the_experiments_by_name(self, tmp_path):
        done = self.run(tmp_path, "--config=quickstart", "--config.train.steps=many", "--workdir=x")
        assert done.returncode == 2 and "--config.train.steps=many" in done.stderr
        done = self.run(tmp_path, "--config=quikstart", "--workdir=x")
        assert done.returncode == 2 and "did you mean 'quickstart'" in done.stderr
        assert list(tmp_path.iterdir()) == []

    def test_its_help_lists_the_flags(self, tmp_path):
        done = self.run(tmp_path, "--help")
        assert done.returncode == 0 and "--workdir" in done.stdout


def test_an_export_evaluates_without_a_configuration(folders, tmp_path, cover):
    """Settings are flags on top of what the weights tell; one that contradicts them is refused."""
    config = tiny.config(folders, eval__num_images=1)
    tiny.export(config, tmp_path / "weights")
    out = tmp_path / "out"
    flags = ["--mode=eval", f"--model={tmp_path / 'weights'}", f"--workdir={out}", "--sampling=1x2"]
    message = refused(*flags, "--config.data.image_size=64")
    assert "config.data.image_size=64, trained with 32" in message
    assert "'{0.__class__}' needs one {}" in refused(*flags, "--template={0.__class__}")
    settings = ["--config.eval.decoder=vae", "--config.eval.view_size=(64, 128)", "--template=land {}"]
    done = run(*flags, *settings, timeout=900)  # it computes: a busy machine takes its time
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "eval" / "results.json").read_text())
    assert (results["num_images"], results["ensemble"], results["steps"]) == (1, 1, 2)
    assert results["decoder"] == "vae" and results["view_size"] == [64, 128]
    assert results["templates"] == ["land {}"] and results["prompts"][0] == "land water"


def test_export_takes_no_settings_of_its_own(workdir):
    message = refused("--mode=export", workdir, "--config.seed=3")
    assert "--config.KEY: --mode=export takes the run's settings" in message


def test_eval_without_trained_weights_says_to_train_first(folders, tmp_path, workdir):
    config = tiny.config_file(tmp_path, folders)
    message = refused(f"--config={config}", workdir, "--mode=eval")
    assert "run --mode=train first" in message
    assert not Path(workdir.split("=")[1]).exists()


def test_export_without_a_run_says_to_train_first(folders, tmp_path, workdir):
    config = tiny.config_file(tmp_path, folders)
    message = refused(f"--config={config}", workdir, "--mode=export")
    assert "no run here to export; run --mode=train first" in message
    assert not Path(workdir.split("=")[1]).exists()


def test_shipped_weights_with_another_prediction_type_are_refused(tmp_path):
    """They would paint forest over most of the image, and nothing would look wrong."""
    Image.new("RGB", (64, 64), (40, 80, 40)).save(tmp_path / "a.png")
    message = refused(
        QUICKSTART, "--config.diffusion.prediction_type=sample", "--mode=predict",
        f"--image={tmp_path / 'a.png'}", "--query=forest", f"--out={tmp_path / 'm.png'}",
    )  # fmt: skip
    assert "config.diffusion.prediction_type='sample', trained with 'v_prediction'" in message


def test_weights_named_twice_are_refused(workdir):
    message = refused("--mode=predict", "--model=a", workdir, "--image=a.png", "--query=ice")
    assert "--model and --workdir" in message


def test_predict_on_a_missing_image_is_one_line(folders, tmp_path, workdir):
    config = tiny.config_file(tmp_path, folders)
    message = refused(f"--config={config}", workdir, "--mode=predict", "--image=no.png", "--query=ice")
    assert "--image=no.png: no such file" in message


def test_ctrl_c_before_there_is_anything_to_save_is_one_line(cover, tmp_path):
    """While the configuration is known, and JAX and the models are still being loaded."""
    command = [
        sys.executable,
        "-u",
        "-m",
        "digseg_jax.main",
        QUICKSTART,
        f"--workdir={tmp_path / 'run'}",
        "--config.train.steps=1000000",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 900
    while not (tmp_path / "run" / "config.json").exists() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=900)[1].splitlines()
    assert process.returncode == INTERRUPTED
    assert said[-1] == "error: interrupted" and "Traceback" not in "".join(said)
