# SPDX-License-Identifier: Apache-2.0
"""Downloads from the hub with `huggingface_hub`: limited in time, checked, and with errors of one line.

The client resumes a file whose connection ends early, and retries for a while. The rest is done here:
API calls without a time limit get one, connections that were reset are tried again, and weights are
compared with the SHA-256 that the hub announces for them.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from digseg_jax.errors import Transient, UserError, passes
from digseg_jax.log import log

ATTEMPTS = 3  # tries of a download that failed for a reason that may pass by itself
PAUSE = 1.0  # seconds before the second attempt; the third waits twice as long
REQUEST_SECONDS = 30.0  # time limit of a request that has none of its own
LOGIN = "set HF_TOKEN, or run `hf auth login`"
_REFUSED = "Invalid credentials"  # part of the answer to a bad token; an anonymous 401 lacks it
_CLOCKS = 2.0  # seconds by which a file system's clock may lag
_SHA256 = re.compile(r"[0-9a-f]{64}")


class _Damaged(Exception):
    """A file whose bytes are not those that the hub announced."""


def snapshot(repository: str, revision: str | None, patterns: list[str], source: str) -> Path:
    """Downloads the files of a repository that match, or finds them in the hub's cache.

    Args:
        repository: org/name.
        revision: branch, tag or commit; None: the main branch.
        patterns: patterns of file names, as `huggingface_hub.snapshot_download(allow_patterns=...)`
          takes them.
        source: what the user wrote, for the error.

    Returns:
        The root of the repository's files in the cache.

    Raises:
        UserError: the hub does not deliver them; the message says why and what helps.
    """
    for attempt in range(1, ATTEMPTS + 1):
        # Only what this attempt downloads is checked: hashing a whole cache at each start takes long.
        started = time.time()
        try:
            root = _client_snapshot(repository, revision, patterns)
            _check_new_files(root, started)
            return root

        # The client's HTTP library and Xet raise exceptions of their own, without a common base.
        except Exception as error:
            reason, passing = _explain(error, repository, revision)
            if not passing or attempt == ATTEMPTS:
                kind = Transient if passing else UserError
                raise kind(f"cannot get {source!r} from the hub: {reason}") from error
            log.warning("%s: %s; attempt %d of %d", source, reason, attempt + 1, ATTEMPTS)
            time.sleep(PAUSE * attempt)
    raise AssertionError("not reached")


def _client_snapshot(repository: str, revision: str | None, patterns: list[str]) -> Path:
    """Makes one attempt with the hub's client, its requests limited in time."""
    # Imported here: most runs never need the hub, and the import costs start-up time.
    from huggingface_hub import snapshot_download

    limit_requests()

    # The client's warning would list all patterns; the error raised here names the repository.
    logging.getLogger(snapshot_download.__module__).setLevel(logging.ERROR)
    return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))


def limit_requests() -> None:
    """Gives every request of the client's session a time limit; calling it again does nothing."""
    from huggingface_hub import get_session

    # The whole process shares the session: add the hook once, and keep those of others.
    hooks = get_session().event_hooks
    if _limit_waiting not in hooks["request"]:
        get_session().event_hooks = {**hooks, "request": [*hooks["request"], _limit_waiting]}


def _limit_waiting(request: Any) -> None:
    """Gives a request the time limits that it lacks: the client's API calls have none."""
    limits = request.extensions.get("timeout", {})
    kinds = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {kind: limits.get(kind) or REQUEST_SECONDS for kind in kinds}


def _check_new_files(root: Path, since: float) -> None:
    """Compares files that arrived after `since` with their SHA-256; removes the first that differs.

    The client compares sizes only. In its cache a snapshot's file is a link to a blob, and the blobs of
    LFS files are named by their SHA-256. A blob that is itself a link came through Xet, which checks
    its chunks.

    Args:
      root: root of the snapshot.
      since: time in seconds since the epoch.

    Raises:
      _Damaged: for the first file that differs.
    """
    for file, blob in _blobs(root):
        if blob.is_symlink() or blob.stat().st_mtime < since - _CLOCKS:
            continue

        with blob.open("rb") as handle:
            found = hashlib.file_digest(handle, "sha256").hexdigest()

        # Remove link and blob, so that the next attempt downloads the file again.
        if found != blob.name:
            file.unlink()
            blob.unlink()
            raise _Damaged(
                f"{file.relative_to(root)} arrived with the SHA-256 {found[:12]}..., the hub announces "
                f"{blob.name[:12]}...; it was removed"
            )


def _blobs(root: Path) -> Iterator[tuple[Path, Path]]:
    """Yields (file, blob) for the snapshot's files whose blob is named by a SHA-256."""
    for file in root.rglob("*"):
        if file.is_symlink():
            blob = file.parent / file.readlink()
            # The link dangles if the download of this file failed.
            with contextlib.suppress(FileNotFoundError):
                if _SHA256.fullmatch(blob.name) and blob.stat():
                    yield file, blob


def _explain(error: Exception, repository: str, revision: str | None) -> tuple[str, bool]:
    """Explains in one line why there is no snapshot and what helps; True if it may pass by itself."""
    from huggingface_hub import constants, errors

    lacking = f"the cache {constants.HF_HUB_CACHE} does not hold all of it"
    if isinstance(error, _Damaged):
        return f"{error}; if it stays so, look at the proxy or mirror between", True
    if constants.HF_HUB_OFFLINE:
        return f"HF_HUB_OFFLINE is set, and {lacking}; fetch it once without that variable", False

    # If the client finds no cached copy either, the hub's answer is the cause.
    unfound = isinstance(error, errors.LocalEntryNotFoundError)
    answer = error.__cause__ or error if unfound else error
    if refused := refusal(answer, repository, revision):
        return refused, False
    if unfound:
        why = f"{constants.ENDPOINT} does not answer ({first_line(answer)})"
        # An answer, such as "too many requests": a machine without a network gets none, ever.
        busy = bool(status_of(answer)) and passes(answer)
        return f"{why}, and {lacking}; try again with a connection", busy

    # Exceptions for lost connections carry neither an errno nor an HTTP status,
    # so whatever has neither is tried again; so are answers of 500 and above.
    final = isinstance(error, ValueError) or getattr(error, "errno", None) or 0 < status_of(error) < 500
    return first_line(error), not final or passes(error)


def refusal(answer: BaseException, repository: str, revision: str | None) -> str:
    """Explains the answer of a hub that refuses a repository; "" if it is not a refusal."""
    from huggingface_hub import constants, errors

    status = status_of(answer)

    # Gated first: such an answer is a 401 or 403 too, and another token would not help.
    if isinstance(answer, errors.GatedRepoError):
        return f"its terms have to be accepted at {constants.ENDPOINT}/{repository}; then {LOGIN}"
    if isinstance(answer, errors.RevisionNotFoundError):
        return f"it has no branch, tag or commit {revision!r}"
    if status == 403 or (status == 401 and _REFUSED in str(answer)):
        return f"the hub refuses the token ({status}); {LOGIN} with another"
    if status == 401 or isinstance(answer, errors.RepositoryNotFoundError):
        return f"no such repository, or a private one ({status}); check the name, or {LOGIN}"
    return ""


def status_of(error: BaseException) -> int:
    """HTTP status of an answer; 0 if there was none."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def first_line(error: BaseException) -> str:
    """First line of the exception's text, or its type."""
    return str(error).strip().split("\n")[0] or type(error).__name__
