# SPDX-License-Identifier: Apache-2.0
"""Uploads a folder to the hub with `huggingface_hub` as one commit, so no revision is half-written.

The client's `upload_folder` commits a large folder in several parts; here all files are sent first and
become visible together. Files that have arrived are not sent again, so a second call continues.
"""

from __future__ import annotations

import re
import time
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from digseg_jax.errors import Transient, UserError, passes
from digseg_jax.log import log
from digseg_jax.weights import download

_TARGET = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")

_INITIAL = {".gitattributes", "README.md", "LICENSE"}  # what the hub puts into a new repository


def check_target(target: str) -> tuple[str, str]:
    """Splits `org/name[@branch]` into repository and branch; raises UserError for another form."""
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
    marker: str = "",
    replaced: tuple[str, ...] = (),
) -> str:
    """Uploads a folder's files to a branch of a repository, in one commit.

    Args:
        folder: the files to upload, at any depth.
        target: org/name, or org/name@branch; a missing repository or branch is made. The token is the
          client's: HF_TOKEN, or that of `hf auth login`.
        message: the commit's message.
        private: whether a repository that is made is private; None: the organization's default.
        marker: a file that a branch with other content must have, or it is refused: the repository is
          somebody's other model. Empty: any branch is taken.
        replaced: patterns of names. The commit removes such files where the folder has none of that
          name, at the top and in folders that it has too; files in other folders stay.

    Returns:
        The id of the commit.

    Raises:
        UserError: the branch holds something else, the hub refuses, or the connection was lost; the
          message says what helps.
    """
    repository, branch = check_target(target)
    for attempt in range(1, download.ATTEMPTS + 1):
        try:
            return _push(folder, repository, branch, message, private, marker, replaced)
        # The client's HTTP library and Xet raise exceptions of their own, without a common base.
        except Exception as error:
            reason, passing = _explain(error, repository, branch)

            # The last attempt, or a reason that no attempt would change.
            if not passing or attempt == download.ATTEMPTS:
                kind = Transient if passing else UserError
                raise kind(f"cannot push {target!r} to the hub: {reason}") from error
            log.warning("%s: %s; attempt %d of %d", target, reason, attempt + 1, download.ATTEMPTS)
            time.sleep(download.PAUSE * attempt)
    raise AssertionError("not reached")


def _push(
    folder: Path,
    repository: str,
    branch: str,
    message: str,
    private: bool | None,
    marker: str,
    replaced: tuple[str, ...],
) -> str:
    """Makes one attempt to upload; returns the id of the commit, see `push_folder`."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    download.limit_requests()
    api = HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    if branch != "main":
        api.create_branch(repository, branch=branch, exist_ok=True)

    # Files of another model are neither replaced nor mixed with these.
    there = api.list_repo_files(repository, revision=branch)
    if marker and marker not in there and (others := sorted(set(there) - _INITIAL)):
        raise UserError(
            f"the branch {branch!r} holds {others[0]!r} and no {marker}, so it is another model's; "
            "name another repository or branch"
        )

    # One commit adds the files and removes those that an older one left behind, in its own places.
    files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    own = {str(PurePosixPath(name).parent) for name in files} | {"."}
    stale = [
        name
        for name in there
        if name not in files
        and str(PurePosixPath(name).parent) in own
        and any(fnmatch(PurePosixPath(name).name, pattern) for pattern in replaced)
    ]
    operations: list[Any] = [
        *(CommitOperationAdd(name, path) for name, path in files.items()),
        *(CommitOperationDelete(name) for name in stale),
    ]
    done = api.create_commit(repository, operations, commit_message=message, revision=branch)
    return done.oid


def _explain(error: BaseException, repository: str, branch: str) -> tuple[str, bool]:
    """Explains in one line why an upload failed and what helps; True if it may pass by itself."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set; push without that variable", False
    if isinstance(error, ValueError):  # such as a model card with faults, listed over several lines
        return " ".join(str(error).split()), False

    # The client wraps the error of a connection in that of a file: look for a status in both.
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
        if 0 < status < 500:  # another reason, such as too many requests, which pass
            return download.first_line(link), passes(link)
    return download.first_line(chain[-1]), True
