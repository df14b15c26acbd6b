# SPDX-License-Identifier: Apache-2.0
"""A segmenter pushed to the hub's server on loopback, and loaded back from there."""

from __future__ import annotations

import time
import types
from pathlib import Path

import pytest
import tiny
from tiny import one_line

import hub
from digseg_jax.errors import Transient, UserError
from digseg_jax.prediction.description import checksum, find_export, read_description
from digseg_jax.prediction.export import push_export
from digseg_jax.prediction.pretrained import load_segmenter
from digseg_jax.weights import download
from digseg_jax.weights.upload import check_target, push_folder

NAME = "org/segmenter"


@pytest.fixture(scope="module")
def export(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    tiny.export(tiny.config(folders), folder)
    return folder


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An empty hub, with this process's client logged in and never waiting."""
    from huggingface_hub.utils import _http

    clock = types.SimpleNamespace(sleep=lambda _: None, time=time.time, monotonic=time.monotonic)
    monkeypatch.setattr(_http, "time", clock)
    monkeypatch.setattr(download, "PAUSE", 0.0)
    repositories = tmp_path / "repositories"
    repositories.mkdir()
    with (
        hub.serve(repositories) as server,
        hub.environment(server.endpoint, tmp_path / "cache", token=server.token),
    ):
        yield server


def files_of(folder: Path) -> dict[str, bytes]:
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != ".gitattributes"}


def refusal(export, target, kind=UserError) -> str:
    with pytest.raises(UserError) as caught:
        push_export(export, target)
    assert type(caught.value) is kind
    return one_line(caught.value)


def test_what_comes_back_is_what_was_pushed(server, export):
    pushed = push_export(export, NAME)
    assert pushed == f"{NAME}@{server.commit(NAME)}"
    assert server.commits == [(NAME, "main")]
    for spec in (NAME, pushed):
        folder = find_export(spec)
        assert files_of(folder) == files_of(export)
    assert read_description(folder) == read_description(export)
    for part in ("unet", "vae", "text_encoder"):
        assert checksum(folder / part) == checksum(export / part)
    config = load_segmenter(pushed).task.config.model
    assert config.vae == str(folder / "vae") and config.text == str(folder / "text_encoder")


def test_a_branch_of_its_own(server, export):
    pushed = push_export(export, f"{NAME}@v1")
    assert server.commits == [(NAME, "v1")] and pushed.endswith(server.commit(NAME, "v1"))
    assert files_of(server.folder / NAME / "main") == {}
    assert files_of(find_export(f"{NAME}@v1")) == files_of(export)


def test_the_second_push_sends_what_changed_and_removes_what_is_old(server, export, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    stale = ("diffusion_pytorch_model.safetensors", "config.json", "unet/old.json")
    kept = ("notes.md", "onnx/model.json", "onnx/unet/model.safetensors")
    for name in (*stale, *kept, "segmenter.json"):
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (old / name).write_text(name)
    push_folder(old, NAME, "an older layout")
    push_export(export, NAME)
    sent = len(server.received)
    others = {name: name.encode() for name in kept}
    assert files_of(server.folder / NAME / "main") == files_of(export) | others
    push_export(export, NAME)
    assert len(server.received) == sent and len(server.commits) == 2


def test_another_model_is_not_replaced(server, export, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model.safetensors").write_text("weights")
    push_folder(tmp_path / "theirs", NAME, "another model")
    before = files_of(server.folder / NAME / "main")
    message = refusal(export, NAME)
    assert "'main' holds 'model.safetensors' and no segmenter.json" in message
    assert files_of(server.folder / NAME / "main") == before and len(server.commits) == 1


def test_a_connection_that_is_cut_is_one_line_and_the_second_call_completes(server, export):
    server.fail("PUT", "cut", times=1_000_000)
    assert f"cannot push {NAME!r} to the hub" in refusal(export, NAME, Transient)
    assert not server.commits and files_of(server.folder / NAME / "main") == {}
    server.faults.clear()
    push_export(export, NAME)
    assert files_of(find_export(NAME)) == files_of(export)


def test_a_commit_that_is_cut_leaves_nothing_and_sends_no_weights_again(server, export):
    server.fail("/commit/main", "cut")
    refusal(export, NAME, Transient)
    sent = len(server.received)
    assert sent and files_of(server.folder / NAME / "main") == {}
    server.faults.clear()
    push_export(export, NAME)
    assert len(server.received) == sent and files_of(find_export(NAME)) == files_of(export)


@pytest.mark.parametrize("status", ["429", "503"])
def test_a_hub_that_is_busy_for_long_asks_to_start_again(server, export, status):
    server.fail("PUT", status, times=1_000_000)
    assert status in refusal(export, NAME, Transient)


def test_a_cut_that_passes_is_not_noticed(server, export):
    server.fail("/preupload/main", "cut", times=1)
    server.fail("PUT", "503", times=1)
    push_export(export, NAME)
    assert files_of(server.folder / NAME / "main") == files_of(export)


def test_without_a_token_it_says_how_to_get_one(server, export, tmp_path):
    with hub.environment(server.endpoint, tmp_path / "other"):
        message = refusal(export, NAME)
    assert "no write access" in message and "HF_TOKEN" in message and "hf auth login" in message
    with hub.environment(server.endpoint, tmp_path / "other", token=server.token, offline=True):
        assert "HF_HUB_OFFLINE is set" in refusal(export, NAME)


def test_a_card_that_the_hub_refuses_is_one_line(server, export, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mine\n---\n")
    (tmp_path / "model.safetensors").write_text("weights")
    with pytest.raises(UserError, match="license 'mine'") as caught:
        push_folder(tmp_path, NAME, "a card")
    one_line(caught.value)
    assert not server.received


@pytest.mark.parametrize("target", ["", "segmenter", "org/a/b", "org/a@", "https://hub/org/a"])
def test_what_is_no_repository(target):
    with pytest.raises(UserError, match="org/name or org/name@branch") as caught:
        check_target(target)
    one_line(caught.value)
