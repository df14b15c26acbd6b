# SPDX-License-Identifier: Apache-2.0
"""Folders of compiled programs: which one is used, and one that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import tiny

from digseg_jax.errors import UserError
from digseg_jax.runtime.compile_cache import AUTO, own_folder, use_compile_cache, use_own_compile_cache


def compile_with(call: str, **environment: str) -> None:
    """Compiles a program after a call, in a process of its own: the setting is one of all of JAX."""
    code = (
        f"import jax; from digseg_jax.runtime.compile_cache import *; jax.jit(lambda x: x - 1)(1.0);"
        f"{call}; jax.jit(lambda x: x + 1)(1.0)"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_COMP", "JAX_PERS"))}
    subprocess.run([sys.executable, "-c", code], check=True, env=kept | environment)


def programs(folder: Path) -> list[Path]:
    return list(folder.rglob("*-cache")) if folder.exists() else []


def test_compiled_programs_are_kept_in_the_named_folder_by_both(tmp_path):
    zero = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    for name in ("use_compile_cache", "use_own_compile_cache"):
        folder = tmp_path / name / "cache"
        compile_with(f"{name}({str(folder)!r})", **zero)
        assert programs(folder)


def test_auto_is_the_users_own_folder_which_nobody_else_may_enter(tmp_path):
    compile_with("use_own_compile_cache(AUTO)", XDG_CACHE_HOME=str(tmp_path))
    (machine,) = (tmp_path / "digseg_jax" / "compile").iterdir()
    assert programs(machine) and machine.stat().st_mode & 0o077 == 0


def test_an_empty_value_and_auto_in_a_training_keep_nothing(tmp_path):
    calls = "use_own_compile_cache(''); use_compile_cache(AUTO); use_compile_cache('')"
    compile_with(calls, XDG_CACHE_HOME=str(tmp_path), HOME=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_environments_folder_goes_before_auto(monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    use_own_compile_cache(AUTO)
    assert jax.config.jax_compilation_cache_dir == before and list(tmp_path.iterdir()) == []


def test_an_own_folder_that_cannot_be_made_costs_one_warning(monkeypatch, tmp_path, caplog):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    before = jax.config.jax_compilation_cache_dir
    use_own_compile_cache(AUTO)
    # a set: pytest hands over a line twice if an earlier test has set up the log
    assert [level for level, _ in {(r.levelname, r.getMessage()) for r in caplog.records}] == [
        "WARNING"
    ]
    assert str(tmp_path / "file") in caplog.text
    assert jax.config.jax_compilation_cache_dir == before


def test_the_own_folder_is_in_the_cache_directory_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert own_folder().parent == tmp_path / ".cache" / "digseg_jax" / "compile"


def test_a_named_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    for use in (use_compile_cache, use_own_compile_cache):
        with pytest.raises(UserError) as caught:
            use(str(tmp_path / "file" / "cache"))
        assert "config.compute.compile_cache" in tiny.one_line(caught.value)
