# SPDX-License-Identifier: Apache-2.0
"""The export of a run beside a training of it, and after it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny

from digseg_jax import jobs
from digseg_jax.config.parse import parse, to_dict
from digseg_jax.errors import UserError
from digseg_jax.io.workdir import claim

HOLDS = """
import sys, time
from pathlib import Path
from digseg_jax.io.workdir import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_an_export_waits_for_no_run_that_trains_there(tmp_path):
    """Its weights of an earlier step took the place of the final ones."""
    claim(tmp_path, to_dict(parse({})))
    other = subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError) as caught:
            jobs.export(tmp_path)
        assert f"{tmp_path}: process {other.pid} on " in tiny.one_line(caught.value)
        assert "trains there" in str(caught.value) and not (tmp_path / "export").exists()
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


def test_an_export_needs_no_devices_of_its_training(tmp_path, monkeypatch):
    """A pod's mesh and batch say nothing about the machine that exports, unless it is asked."""
    trained = parse({"mesh": {"data": 4, "fsdp": 8}, "compute": {"accumulation": 8}})
    claim(tmp_path, to_dict(trained))
    seen = []

    def set_up(config, task):
        seen.append(config)
        raise UserError("enough")

    monkeypatch.setattr(jobs, "set_up", set_up)
    for config in (None, trained):
        with pytest.raises(UserError, match="enough"):
            jobs.export(tmp_path, config)
    assert dataclasses.astuple(seen[0].mesh)[:3] == (-1, 0, 1) and seen[0].compute.accumulation == 0
    assert seen[1] == trained


def test_older_weights_never_replace_newer_ones(tmp_path, monkeypatch):
    export = tmp_path / "export"
    export.mkdir()
    (export / jobs.DESCRIPTION).write_text("{}")
    monkeypatch.setattr(jobs, "read_description", lambda folder: SimpleNamespace(steps=400))
    jobs.check_not_older(tmp_path, "checkpoints/400")
    with pytest.raises(UserError, match="weights of step 400, newer than checkpoints/280"):
        jobs.check_not_older(tmp_path, "checkpoints/280")
