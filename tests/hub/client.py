# SPDX-License-Identifier: Apache-2.0
"""Settings of `huggingface_hub`, which reads its environment once, for a process and its children."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

OFFLINE, TOKEN = "HF_HUB_OFFLINE", "HF_TOKEN"


def variables(endpoint: str, cache: Path, *, token: str = "", offline: bool = False) -> dict[str, str]:
    """Environment variables that make a new process use the hub at `endpoint` with an own cache."""
    values = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1",  # what is pushed goes by LFS, the server's way
    }
    return values | ({TOKEN: token} if token else {}) | ({OFFLINE: "1"} if offline else {})


@contextlib.contextmanager
def environment(
    endpoint: str, cache: Path, *, token: str = "", offline: bool = False
) -> Iterator[dict[str, str]]:
    """Points this process, and those that it starts, at the hub at `endpoint`; yields the variables."""
    from huggingface_hub import close_session, constants
    from huggingface_hub.utils import _http

    values = variables(endpoint, cache, token=token, offline=offline)
    changed = {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": values["HF_HOME"],
        "HF_HUB_CACHE": values["HF_HUB_CACHE"],
        "HF_TOKEN_PATH": values["HF_TOKEN_PATH"],
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_XET": True,
    }
    kept = {k: v for k, v in os.environ.items() if k not in (OFFLINE, TOKEN)}
    origins = frozenset({_http._url_origin(endpoint)})
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, kept | values, clear=True))
        for name, value in changed.items():
            stack.enter_context(mock.patch.object(constants, name, value))
        stack.enter_context(mock.patch.object(_http, "_HUB_ORIGINS", origins))
        stack.callback(close_session)
        close_session()
        yield values
