# SPDX-License-Identifier: Apache-2.0
"""Options of the TPU compiler: those that the installed one takes, and a word for the others."""

from __future__ import annotations

import jax
import pytest

from digseg_jax.runtime import tpu


@pytest.fixture(autouse=True)
def asked_anew():
    tpu.refusals.cache_clear()
    yield
    tpu.refusals.cache_clear()


def test_other_platforms_get_none():
    assert tpu.compiler_options("cpu") is None
    assert tpu.untuned("cpu") == {}


def test_a_compiler_that_takes_all_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr(tpu, "refusal", asked.append)  # which returns None
    for _ in range(2):
        assert tpu.compiler_options("tpu") == tpu.OPTIONS
        assert tpu.untuned("tpu") == tpu.UNTUNED
    assert asked == [tpu.OPTIONS | tpu.UNTUNED]


def test_what_it_refuses_is_left_out_and_said(monkeypatch, caplog):
    gone = "xla_tpu_run_space_to_batch"
    why = f"No such compile option: {gone!r}"
    monkeypatch.setattr(tpu, "refusal", lambda options: why if gone in options else None)
    kept = {name: value for name, value in tpu.OPTIONS.items() if name != gone}
    assert tpu.compiler_options("tpu") == kept
    assert tpu.untuned("tpu") == tpu.UNTUNED
    assert tpu.refusals() == {gone: why}
    # a logger that passes its records on may be listened to twice
    (line,) = {r.getMessage() for r in caplog.records if r.name == "digseg_jax"}
    assert gone in line and why in line


def test_a_compiler_says_itself_what_it_takes():
    """Asked of the CPU's, which is always there; the answer comes from the real compiler."""
    device = jax.devices("cpu")[0]
    assert tpu.refusal({"xla_cpu_enable_fast_math": False}, device) is None
    assert "xla_no_such_option" in tpu.refusal({"xla_no_such_option": 1}, device)
