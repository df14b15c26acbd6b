# SPDX-License-Identifier: Apache-2.0
"""What a command raises: one line and a status for what a user can put right."""

from __future__ import annotations

import errno
import http.client
import json
import socket
import ssl
from types import SimpleNamespace

import jax
import pytest

from digseg_jax.errors import (
    CRASH,
    INTERRUPTED,
    OVER_BUDGET,
    PREEMPTED,
    USER_ERROR,
    Preempted,
    Transient,
    UserError,
    passes,
    refusal,
)
from digseg_jax.io.storage import write_json
from digseg_jax.log import log
from digseg_jax.runtime.door import run_tool, tell
from digseg_jax.tools import convert_weights, performance_page, prepare_data


@pytest.mark.parametrize(
    ("error", "status", "lines"),
    [
        (UserError("two\nlines"), USER_ERROR, ["error: two lines"]),
        (OSError(errno.ENOSPC, "No space"), USER_ERROR, ["error: a file cannot be written: No space"]),
        (NotADirectoryError(errno.ENOTDIR, "Not one", "a/b"), USER_ERROR, ["error: a/b: Not one"]),
        (OSError(errno.ELOOP, "Links", "a/b"), USER_ERROR, ["error: a/b: Links"]),
        (OSError(errno.EIO, "Bad disk"), USER_ERROR, ["error: a file cannot be written: Bad disk"]),
        (KeyboardInterrupt(), INTERRUPTED, ["error: interrupted"]),
        (Preempted("saved"), PREEMPTED, []),
        (Transient("process 1 is late"), PREEMPTED, ["error: process 1 is late; this is temp"]),
        (ConnectionResetError(errno.ECONNRESET, "reset"), PREEMPTED, ["error: another process of the"]),
    ],
)  # fmt: skip
def test_one_line(capsys, monkeypatch, error, status, lines):
    monkeypatch.setattr(log, "handlers", [])  # another test's command may have set up the log
    assert tell(error) == status
    said = capsys.readouterr().err.splitlines()
    assert len(said) == len(lines) and all(
        s.startswith(line) for s, line in zip(said, lines, strict=True)
    )


class Answer(Exception):
    """An answer of a bucket with its HTTP status, as the clients' exceptions have it."""

    def __init__(self, code):
        super().__init__(f"{code}: the service says so, UNAVAILABLE or not")
        self.code = code


class Refused(Exception):
    """An answer of the hub with its HTTP status, as its client's exceptions have it."""

    def __init__(self, code):
        super().__init__("refused")
        self.response = SimpleNamespace(status_code=code)


def of_library(*names):
    """An error of a library's own class, by the names of its base classes, the last one first."""
    kind = Exception
    for name in reversed(names):
        kind = type(name, (kind,), {})
    return kind("it ended")


PASSING = [
    OSError(errno.EHOSTUNREACH, "No route to host"),
    OSError(errno.ESTALE, "Stale file handle", "/nfs/run"),
    socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
    http.client.IncompleteRead(b"", 9),
    ssl.SSLEOFError(8, "EOF occurred in violation of protocol"),
    of_library("ServerDisconnectedError", "ClientConnectionError"),  # aiohttp
    of_library("ReadTimeout", "Timeout"),  # requests
    of_library("RemoteProtocolError", "TransportError"),  # httpx
    ValueError("CURL error[28] Timeout was reached"),
    Refused(503),
    TimeoutError("not written after 600 s"),
    ConnectionRefusedError("nobody listens"),
    *(Answer(code) for code in (408, 429, 500, 502, 503, 504)),
    jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out. Id: checkpoint:3"),
    jax.errors.JaxRuntimeError("UNAVAILABLE: The following tasks are unhealthy (stopped sending h"),
    jax.errors.JaxRuntimeError(
        "INTERNAL: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]"
    ),
    ValueError(
        "UNAVAILABLE: Error writing local file: HTTP response code: 503 [source locations='a.cc']"
    ),
]
FINAL = [
    Refused(404),
    ValueError("CURL error[60] SSL peer certificate was not OK"),
    ssl.SSLCertVerificationError(1, "certificate verify failed"),
    socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
    UserError("config.train.steps=-1: must be positive"),
    *(Answer(code) for code in (400, 401, 403, 404, 412)),
    OSError(errno.ENOSPC, "No space left on device"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes"),
    ValueError("PERMISSION_DENIED: HTTP response code: 403"),
]


@pytest.mark.parametrize("cause", PASSING, ids=repr)
def test_what_passes_is_told_as_such_by_everybody(cause):
    assert passes(cause) and isinstance(refusal("not written", cause), Transient)
    wrapped = RuntimeError("the save failed")
    wrapped.__cause__ = cause
    assert passes(wrapped)


@pytest.mark.parametrize("cause", FINAL, ids=repr)
def test_what_stays_is_final(cause):
    assert not passes(cause) and type(refusal("not written", cause)) is UserError


def test_no_secret_of_an_address_is_printed(capsys):
    address = "https://x/upload?upload_id=ABg5-&name=a (Bearer ya29.abcdefghij, hf_abcdefghijkl)"
    assert tell(UserError(f"gs://b/x: cannot be written ({address})")) == USER_ERROR
    tell(RuntimeError(address))
    said = capsys.readouterr().err
    assert "upload_id=...&name=a" in said and "Bearer ..." in said
    assert not any(secret in said for secret in ("ABg5", "abcdefghij"))


def test_a_defect_keeps_its_traceback(capsys):
    def job():
        raise KeyError("x")

    assert run_tool(job) == CRASH
    assert "Traceback" in capsys.readouterr().err
    assert tell(MemoryError("no room")) == OVER_BUDGET
    assert tell(OSError(errno.ENOMEM, "Cannot allocate memory")) == OVER_BUDGET


@pytest.mark.parametrize("place", ["/proc/out", "FILE/out"])
def test_tools_that_cannot_write_say_so_in_one_line(tmp_path, capsys, monkeypatch, place):
    (tmp_path / "FILE").write_text("")
    monkeypatch.chdir(tmp_path)
    arguments = ["prepare", "--dataset=landcover", "--root=", f"--out={place}", "--split=val"]
    monkeypatch.setattr("sys.argv", arguments)
    assert prepare_data.main() == USER_ERROR
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ") and "out" in said


def test_every_tool_has_the_door(tmp_path, capsys):
    assert convert_weights.main([str(tmp_path)]) == USER_ERROR
    assert performance_page.main([str(tmp_path)]) == USER_ERROR
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2 and all(line.startswith("error: ") for line in said)


def test_json_files_are_json(tmp_path):
    write_json(tmp_path / "a.json", {"iou": [float("nan"), 0.5], "scale": float("inf"), "n": 3})
    text = (tmp_path / "a.json").read_text()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict == {"iou": [None, 0.5], "scale": None, "n": 3}
