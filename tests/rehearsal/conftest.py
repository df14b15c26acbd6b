# SPDX-License-Identifier: Apache-2.0
"""One stage for all rehearsals: its hub, its cache of weights, its processes."""

from __future__ import annotations

import importlib.util

import hub
import pytest

from rehearsal import stage as stage_lib


@pytest.fixture(scope="session")
def stage(tmp_path_factory):
    if importlib.util.find_spec("torch") is None:
        pytest.fail("a rehearsal ends with torch, which reads the export: pip install torch diffusers")
    repositories = hub.write_all(tmp_path_factory.mktemp("shallow_repositories"))
    stage_lib.make_shallow(repositories)
    with stage_lib.set_up(tmp_path_factory.mktemp("stage"), repositories) as stage:
        yield stage
