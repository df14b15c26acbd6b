# SPDX-License-Identifier: Apache-2.0
"""What all processes of a run must have alike: flags, configuration, code and libraries."""

from __future__ import annotations

import platform
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import digseg_jax
from digseg_jax.packages import LIBRARIES, versions_of
from digseg_jax.runtime.collectives import check_all_agree

# settings that may differ between hosts: folders on their disks, and their worker processes
PER_HOST = ("data.root", "data.mixture", "loading.workers", "compute.compile_cache")


def check_processes(settings: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
    """Checks that all processes of the run have the same flags, configuration, code and libraries.

    Other versions make other programs, which wait for each other or end with other bits.

    settings: values of the configuration by key; those that are known already.

    Raises:
      UserError: on every process: names the processes that differ, and in what.
    """
    values = {f"config.{key}": value for key, value in settings.items() if key not in PER_HOST}
    libraries = versions_of((*LIBRARIES, "jaxlib", "libtpu")) | {"Python": platform.python_version()}
    versions = {f"the version of {name}": text for name, text in libraries.items()}
    check_all_agree({**flags, **values, **versions, "the code's checksum": _checksum_of_the_code()})


def _checksum_of_the_code() -> int:
    """CRC-32 of the package's source files."""
    checksum = 0
    for path in sorted(Path(digseg_jax.__file__).parent.rglob("*.py")):
        checksum = zlib.crc32(path.read_bytes(), checksum)
    return checksum
