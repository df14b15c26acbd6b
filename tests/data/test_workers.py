# SPDX-License-Identifier: Apache-2.0
"""Data workers end with the process that started them, and say what they lack."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from digseg_jax.data import workers

PARENT = """
import multiprocessing, sys, time
from digseg_jax.data import workers

def work(queue):
    workers.WATCH_EVERY = 0.2
    workers.start_worker(0, 1)
    import os
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    context.Process(target=work, args=(None,)).start()
    time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc"), reason="looks into /proc")
def test_a_worker_does_not_outlive_a_kill_of_its_parent():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    try:
        assert alive(worker)
        parent.kill()
        parent.wait()
        end = time.monotonic() + 60
        while alive(worker) and time.monotonic() < end:
            time.sleep(0.1)
        assert not alive(worker)
    finally:
        parent.stdout.close()
        if alive(worker):
            os.kill(worker, signal.SIGKILL)


def test_little_shared_memory_is_told_with_its_cure(caplog, monkeypatch):
    docker = SimpleNamespace(f_frsize=4096, f_blocks=2**14)  # 64 MiB
    monkeypatch.setattr(os, "statvfs", lambda place: docker)
    with caplog.at_level(logging.WARNING, "digseg_jax"):
        workers.tell_shared_memory(0)
        assert not caplog.text
        workers.tell_shared_memory(2)
    assert "/dev/shm has 64 MiB" in caplog.text and "--shm-size=2g" in caplog.text
