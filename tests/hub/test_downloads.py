# SPDX-License-Identifier: Apache-2.0
"""`weights.resolve` with the hub's own client against the server on loopback, which also fails."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import one_line

import hub
from digseg_jax.errors import Transient, UserError
from digseg_jax.weights import catalog, download, load_config, resolve
from digseg_jax.weights.hub import resolve_tokenizer
from digseg_jax.weights.safetensors_io import weight_files
from hub.client import variables
from hub.server import sha256

SD15 = catalog.hub_id("sd-1.5")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def server(repositories, monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.0)
    with hub.serve(repositories) as server:
        yield server


@pytest.fixture
def online(server, tmp_path):
    """The server, with this process's client pointed at it."""
    with hub.environment(server.endpoint, tmp_path / "cache"):
        yield server


@pytest.fixture
def impatient(monkeypatch):
    """The client's time limits, short."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)
    monkeypatch.setattr(download, "REQUEST_SECONDS", 0.3)


def refusal(spec: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve(spec)
    return one_line(caught.value)


def same_bytes(folder: Path, repositories: Path, revision: str = "main") -> bool:
    name = f"{folder.name}/{weight_files(folder)[0].name}"
    return sha256(folder.parent / name) == sha256(repositories / SD15 / revision / name)


def test_an_id_with_subfolder_brings_what_the_component_needs_and_no_more(online, repositories):
    folder = resolve("sd-1.5:unet")
    scheduler = "scheduler/scheduler_config.json"  # which says how the U-Net was trained
    assert online.fetched() == {"unet/config.json", WEIGHTS, scheduler}
    assert (folder.parent / scheduler).is_file()
    assert same_bytes(folder, repositories)
    assert resolve(SD15, "unet") == folder == resolve(f"{SD15}:unet")
    resolve("sd-1.5:text_encoder")
    assert "tokenizer/merges.txt" in online.fetched()
    assert not any(name.endswith((".bin", ".fp16.safetensors")) for name in online.fetched())


@pytest.mark.parametrize("revision", ["fp16", "commit"])
def test_a_branch_and_a_commit(online, repositories, revision):
    if revision == "commit":
        revision = online.commit(SD15, "fp16")
    folder = resolve(f"{SD15}@{revision}:unet")
    assert online.commit(SD15, "fp16") in folder.parts
    assert same_bytes(folder, repositories, "fp16")
    assert not same_bytes(folder, repositories, "main")


def test_shards_and_a_half_precision_variant(online):
    sharded = resolve(f"{SD15}@sharded:unet")
    assert len(weight_files(sharded)) == 3
    assert [f.name for f in weight_files(resolve(f"{SD15}@half:unet"))] == [
        "diffusion_pytorch_model.fp16.safetensors"
    ]
    assert load_config(f"{SD15}@sharded-half:unet") == load_config(sharded)


def test_what_is_cached_is_used_without_network(online):
    folder = resolve("sd-1.5:unet")
    online.requests.clear()
    assert resolve("sd-1.5:unet") == folder
    assert not any("unet/" in path for _, path in online.requests)  # the commit is asked for alone
    online.stop()
    assert resolve("sd-1.5:unet") == folder
    message = refusal("sd-1.5:vae")
    assert "does not answer" in message and online.endpoint in message
    assert "'stable-diffusion-v1-5/stable-diffusion-v1-5:vae'" in message


def test_offline_by_flag(server, tmp_path):
    with hub.environment(server.endpoint, tmp_path):
        folder = resolve("sd-1.5:unet")
    server.requests.clear()
    with hub.environment(server.endpoint, tmp_path, offline=True):
        assert resolve("sd-1.5:unet") == folder
        message = refusal("sd-1.5:vae")
        assert "HF_HUB_OFFLINE is set" in message and str(tmp_path) in message
        assert "HF_HUB_OFFLINE is set" in refusal("taesd")
    assert not server.requests


@pytest.mark.parametrize("revision", ["", "@half"])
def test_a_cache_that_lacks_what_can_be_done_without_is_enough_offline(server, tmp_path, revision):
    """Fetched by hand, say: without the scheduler, or in half precision alone."""
    with hub.environment(server.endpoint, tmp_path):
        folder = resolve(f"{SD15}{revision}:unet")
    (folder.parent / "scheduler/scheduler_config.json").unlink()
    with hub.environment(server.endpoint, tmp_path, offline=True):
        assert resolve(f"{SD15}{revision}:unet") == folder
        weight_files(folder)[0].unlink()
        assert "HF_HUB_OFFLINE is set" in refusal(f"{SD15}{revision}:unet")


@pytest.mark.parametrize("status", ["429", "503"])
def test_a_hub_that_is_busy_is_asked_again_and_no_final_error(online, impatient, status):
    online.fail("revision/main", status)
    with pytest.raises(Transient, match="does not answer"):
        resolve("sd-1.5:unet")


def test_what_does_not_exist(online):
    assert "no such repository" in refusal("org/missing:unet")
    assert "HF_TOKEN" in refusal("org/missing")
    assert "no branch, tag or commit 'v9'" in refusal(f"{SD15}@v9:unet")
    assert "no such folder in that repository" in refusal(f"{SD15}:unett")
    assert "has no safetensors" in refusal(catalog.hub_id("biomedclip"))


def test_a_gated_repository(server, tmp_path):
    server.gated.add(SD15)
    page = f"{server.endpoint}/{SD15}"
    with hub.environment(server.endpoint, tmp_path):
        message = refusal("sd-1.5:unet")
        assert f"terms have to be accepted at {page}" in message and "HF_TOKEN" in message
    with hub.environment(server.endpoint, tmp_path, token="hf_expired"):
        assert "refuses the token (401)" in refusal("sd-1.5:unet")
    server.forbidden.add(SD15)
    with hub.environment(server.endpoint, tmp_path, token=server.token):
        assert f"terms have to be accepted at {page}" in refusal("sd-1.5:unet")
        server.forbidden.clear()
        assert resolve("sd-1.5:unet").is_dir()
    assert "no such repository" in _refusal_with_token(server, tmp_path)


def _refusal_with_token(server, cache: Path) -> str:
    with hub.environment(server.endpoint, cache, token=server.token):
        return refusal("org/missing:unet")


def test_a_connection_cut_within_a_file_goes_on_where_it_was(online, repositories, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what is kept of a cut file
    online.fail(WEIGHTS, "cut", times=2)
    assert same_bytes(resolve("sd-1.5:unet"), repositories)
    size = (repositories / SD15 / "main" / WEIGHTS).stat().st_size
    assert size <= online.sent[WEIGHTS] < size + 2 * 1000  # but for the chunks that were cut
    assert not online.faults[WEIGHTS][1]


def test_a_connection_reset_within_a_file_is_tried_again(online, repositories):
    online.fail(WEIGHTS, "reset", times=2)
    assert same_bytes(resolve("sd-1.5:unet"), repositories)
    assert not online.faults[WEIGHTS][1]


@pytest.mark.parametrize("how", ["reset", "short", "503", "wrong"])
def test_what_stays_broken_ends_in_one_line(online, how):
    online.fail(WEIGHTS, how)
    message = refusal("sd-1.5:unet")
    assert "cannot get 'stable-diffusion-v1-5/stable-diffusion-v1-5:unet'" in message
    assert online.requests.count(("GET", f"/{SD15}/main/{WEIGHTS}")) == download.ATTEMPTS
    if how == "wrong":
        assert f"{WEIGHTS} arrived with the SHA-256" in message


def test_wrong_bytes_are_fetched_again_and_never_kept(online, repositories, tmp_path):
    online.fail(WEIGHTS, "wrong")
    refusal("sd-1.5:unet")
    assert not list(tmp_path.rglob("diffusion_pytorch_model.safetensors"))
    online.fail(WEIGHTS, "wrong", times=1)
    assert same_bytes(resolve("sd-1.5:unet"), repositories)


def test_a_cached_file_is_not_read_again(online, monkeypatch):
    folder = resolve("sd-1.5:unet")
    monkeypatch.setattr(download, "_CLOCKS", -1e9)  # as if long ago
    monkeypatch.setattr(download.hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert resolve("sd-1.5:unet") == folder


def test_a_hub_that_says_nothing_is_not_waited_for_for_ever(online, impatient):
    online.fail("revision/main", "stall")
    started = time.monotonic()
    assert "does not answer" in refusal("sd-1.5:unet")
    assert time.monotonic() - started < 20


def test_a_transfer_that_stands_still_goes_on(online, impatient, repositories, monkeypatch):
    online.fail(WEIGHTS, "stall", times=1)
    assert same_bytes(resolve("sd-1.5:unet"), repositories)


def test_a_port_that_nobody_listens_on(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with hub.environment(endpoint, tmp_path):
            assert f"{endpoint} does not answer" in refusal("sd-1.5:unet")


def test_a_new_process_reads_the_environment(server, tmp_path):
    """HF_ENDPOINT, HF_HOME and HF_TOKEN as a user sets them."""
    server.gated.add(SD15)
    code = "from digseg_jax.weights import resolve; print(resolve('sd-1.5:unet'))"
    found = {}
    for token in ("", server.token):
        env = variables(server.endpoint, tmp_path / "home", token=token)
        env |= {"PATH": "", "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        found[token] = done
    assert "terms have to be accepted" in found[""].stderr
    folder = Path(found[server.token].stdout.strip().splitlines()[-1])
    assert folder.is_relative_to(tmp_path / "home") and (folder / "config.json").is_file()


def test_a_tokenizer_alone_comes_without_weights(online):
    """For a checkpoint in one file, which has no tokenizer of its own."""
    folder = resolve_tokenizer(SD15)
    assert {"vocab.json", "merges.txt"} <= {p.name for p in folder.iterdir()}
    asked = [path for _, path in online.requests]
    assert any("vocab.json" in path for path in asked)
    assert not any("safetensors" in path for path in asked)
