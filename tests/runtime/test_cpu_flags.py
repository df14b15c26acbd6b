# SPDX-License-Identifier: Apache-2.0
"""The XLA flag that CPUs need for speed: set for a tried jaxlib, left out with a line for another."""

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
