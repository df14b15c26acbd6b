# SPDX-License-Identifier: Apache-2.0
"""Uploads a folder to the hub with `huggingface_hub`, as one commit: a revision is never half-written.

The client's `upload_folder` commits a large folder in several parts; here its files are sent first and
become visible together. What has arrived is not sent again, so a second call goes on where one ended.
"""

from __future__ import annotations

import re
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from digseg_jax.errors import UserError
from digseg_jax.log import log
from digseg_jax.weights import download

_TARGET = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def check_target(target: str) -> tuple[str, str]:
    """The repository and the branch of `org/name[@branch]`; raises UserError if it is not one."""
    found = _TARGET.fullmatch(target)
    if found is None:
        raise UserError(f"{target!r}: not a repository of the hub; legal: org/name or org/name@branch")
    return found["repo"], found["revision"] or "main"


def push_folder(
    folder: Path,
    target: str,
    message: str,
    *,
    private: bool | None = None,
    replaced: tuple[str, ...] = (),
) -> str:
    """Makes a branch of a repository hold a folder's files; returns the commit.

    Args:
        folder: what to upload.
        target: org/name, or org/name@branch; both are made if they are missing. The token is the
          client's: HF_TOKEN, or that of `hf auth login`.
        message: of the commit.
        private: of a repository that is made; None: what the organization's default is.
        replaced: patterns of files that the commit removes, unless the folder has them.

    Raises:
        UserError: the hub refuses, or the connection was lost; the message says what helps.
    """
    repository, branch = check_target(target)
    for attempt in range(1, download.ATTEMPTS + 1):
        try:
            return _push(folder, repository, branch, message, private, replaced)
        # The client's HTTP library and Xet raise exceptions of their own, without a common base.
        except Exception as error:
            reason, passing = _explain(error, repository, branch)
            if not passing or attempt == download.ATTEMPTS:
                again = "; the same command goes on where it ended" if passing else ""
                raise UserError(f"cannot push {target!r} to the hub: {reason}{again}") from error
            log.warning("%s: %s; attempt %d of %d", target, reason, attempt + 1, download.ATTEMPTS)
            time.sleep(download.PAUSE * attempt)
    raise AssertionError("not reached")


def _push(
    folder: Path,
    repository: str,
    branch: str,
    message: str,
    private: bool | None,
    replaced: tuple[str, ...],
) -> str:
    """One attempt."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    download.limit_requests()
    api = HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    if branch != "main":
        api.create_branch(repository, branch=branch, exist_ok=True)

    # Additions, and what an older export left behind.
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    there = api.list_repo_files(repository, revision=branch)
    stale = [name for name in there if name not in files and any(fnmatch(name, p) for p in replaced)]
    operations: list[Any] = [
        *(CommitOperationAdd(name, path) for name, path in files.items()),
        *(CommitOperationDelete(name) for name in stale),
    ]
    done = api.create_commit(repository, operations, commit_message=message, revision=branch)
    return done.oid


def _explain(error: BaseException, repository: str, branch: str) -> tuple[str, bool]:
    """Why the hub did not take it and what helps, in one line; and whether it may pass by itself."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set; push without that variable", False
    if isinstance(error, ValueError):  # of a card, say, whose faults follow on further lines
        return " ".join(str(error).split()), False

    # An error of a single file wraps the one of its connection.
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for link in chain:
        status = download.status_of(link)
        if status in (401, 403):
            why = f"no write access to {repository} ({status})"
            return f"{why}; {download.LOGIN}, with a token that may write", False
        if refused := download.refusal(link, repository, branch):
            return refused, False
        if 0 < status < 500:
            return download.first_line(link), False
    return download.first_line(chain[-1]), True
