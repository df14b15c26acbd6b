# SPDX-License-Identifier: Apache-2.0
"""The host's memory; and the XLA flag that CPUs need for speed, set for a tried jaxlib only."""

from __future__ import annotations

import importlib.metadata
import os

import pytest

from digseg_jax.runtime import cpu


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")


def with_jaxlib(monkeypatch, version: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)


def test_a_tried_jaxlib_gets_it_beside_the_users_flags(monkeypatch, caplog):
    with_jaxlib(monkeypatch, f"{cpu.TRIED[-1]}3")
    cpu.tune()
    assert os.environ["XLA_FLAGS"] == f"--xla_backend_optimization_level=0 {cpu.FLAG}"
    assert not caplog.records


def test_an_untried_one_does_not_and_a_line_says_so(monkeypatch, caplog):
    with_jaxlib(monkeypatch, "9.1.0")
    with caplog.at_level("INFO", "digseg_jax"):
        cpu.tune()
    assert cpu.FLAG not in os.environ["XLA_FLAGS"]
    assert "jaxlib 9.1.0" in caplog.text and cpu.FLAG in caplog.text


def test_what_the_user_has_set_stays(monkeypatch, caplog):
    monkeypatch.setenv("XLA_FLAGS", own := cpu.FLAG.replace("=", "=own"))
    with_jaxlib(monkeypatch, "9.1.0")
    cpu.tune()
    assert os.environ["XLA_FLAGS"] == own and not caplog.records


@pytest.mark.parametrize(
    ("line", "limits", "expected"),
    [
        ("0::/", {"memory.max": "7000"}, 7000),
        ("0::/slurm/job/step", {"slurm/memory.max": "max", "slurm/job/memory.max": "5000"}, 5000),
        ("0::/job", {"memory.max": "3000", "job/memory.max": "5000"}, 3000),
        ("9:cpu,memory:/job", {"memory/job/memory.limit_in_bytes": "4000"}, 4000),
        ("0::/not/seen/here", {"memory.max": "6000"}, 6000),
        ("9:cpu:/job", {"memory/job/memory.limit_in_bytes": "4000"}, None),
    ],
)
def test_a_jobs_limit_counts_wherever_in_the_tree_of_groups_it_stands(tmp_path, line, limits, expected):
    for name, text in limits.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text + "\n")
    (tmp_path / "cgroup").write_text(f"5:freezer:/\n{line}\n")
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert cpu.host_memory(tmp_path / "cgroup", tmp_path / "groups") == (expected or machine)
