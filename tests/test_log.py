# SPDX-License-Identifier: Apache-2.0
"""Lines that tell that long, silent work goes on."""

from __future__ import annotations

import io
import logging
import threading
import time

import pytest

from digseg_jax import log as logs


def test_a_heartbeat_beats_until_the_work_is_done(caplog):
    with caplog.at_level(logging.INFO, "digseg_jax"), logs.heartbeat("compiling", every=0.01):
        end = time.monotonic() + 60
        while len(caplog.records) < 2 and time.monotonic() < end:
            time.sleep(0.01)
    assert len(caplog.records) >= 2
    said = [record.getMessage() for record in caplog.records]
    assert all(line.startswith("compiling, ") and line.endswith(" s so far") for line in said)
    time.sleep(0.05)
    assert len(caplog.records) == len(said)


def test_it_ends_with_an_error_too():
    with pytest.raises(ValueError, match="refused"), logs.heartbeat("compiling"):
        raise ValueError("refused")
    assert all(thread.name != "heartbeat" for thread in threading.enumerate())


def test_lines_go_to_the_stderr_of_the_moment(capsys, monkeypatch):
    """A process may change its stderr, as every test under pytest does."""
    closed = io.StringIO()
    with monkeypatch.context() as before:
        before.setattr("sys.stderr", closed)
        logs.setup()
    closed.close()

    logs.log.info("still here")
    assert capsys.readouterr().err.endswith(" still here\n")
