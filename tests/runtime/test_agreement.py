# SPDX-License-Identifier: Apache-2.0
"""What the processes of a run compare with each other at the start."""

from __future__ import annotations

import importlib.metadata
import platform

from digseg_jax.runtime import agreement


def test_flags_settings_code_and_libraries_are_compared_but_not_a_hosts_own(monkeypatch):
    compared: dict = {}
    monkeypatch.setattr(agreement, "check_all_agree", compared.update)
    settings = {"seed": 1, "data.root": "/here", "loading.workers": 3}
    agreement.check_processes(settings, {"--workdir": "gs://bucket/run"})
    assert compared["--workdir"] == "gs://bucket/run" and compared["config.seed"] == 1
    assert not {"config.data.root", "config.loading.workers"} & compared.keys()
    assert compared["the version of Python"] == platform.python_version()
    assert compared["the version of jaxlib"] == importlib.metadata.version("jaxlib")
    assert isinstance(compared["the code's checksum"], int)
