# SPDX-License-Identifier: Apache-2.0
"""Folders of compiled programs, which a second start loads instead of compiling again."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from digseg_jax.errors import UserError, refusal
from digseg_jax.io.storage import as_path, check_writable
from digseg_jax.log import log

AUTO = "auto"  # config.compute.compile_cache: the user's own folder where a person waits, else none
MAX_BYTES = 2**31  # of the user's own folder; the programs that were not used for longest go first


def use_compile_cache(folder: str) -> None:
    """Keeps compiled programs in `folder` (created if missing; gs:// too); "" and AUTO change nothing.

    Raises:
      UserError: the folder cannot be made, or the bucket not be written.
    """
    if folder in ("", AUTO):
        return

    # JAX would go on without a cache: nobody would know why every start compiles.
    place = as_path(folder)
    try:
        check_writable(place)
    except UserError as error:
        raise refusal(f"config.compute.compile_cache={folder!r}: {error}", error) from error
    _keep_in(str(place))


def use_own_compile_cache(folder: str) -> None:
    """As `use_compile_cache`; AUTO is a folder in the user's cache directory, in which all is kept.

    A folder that cannot be written costs a warning. JAX_COMPILATION_CACHE_DIR goes before AUTO.

    Raises:
      UserError: a folder that the user named cannot be made.
    """
    if folder != AUTO or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        use_compile_cache(folder)
        return

    # Programs are code that will be run, so the folder is for this user alone.
    try:
        place = own_folder()
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not os.access(place, os.W_OK):
            raise PermissionError(13, f"no permission to write to {place}")
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        log.warning("compiled programs are not kept for the next start: %s", error)
        return

    # Many small programs together compile for seconds.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    _keep_in(str(place))


def own_folder() -> Path:
    """XDG_CACHE_HOME/digseg_jax/compile/MACHINE, by default in ~/.cache.

    MACHINE: a program that was compiled for one processor can end with an illegal instruction on
    another, and a home directory may be shared between machines.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "digseg_jax" / "compile" / _machine()


def _machine() -> str:
    """Name of the processor's kind: its architecture, and a checksum of its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kinds = {line for line in lines if line.startswith(("flags", "Features", "model name"))}
    return f"{platform.machine()}-{hashlib.sha256(repr(sorted(kinds)).encode()).hexdigest()[:12]}"


def _keep_in(place: str) -> None:
    """Makes JAX keep its programs in a folder from now on."""
    # JAX settles on a folder at its first compilation, so the cache is reset.
    jax.config.update("jax_compilation_cache_dir", place)
    compilation_cache.reset_cache()
