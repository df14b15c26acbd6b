# SPDX-License-Identifier: Apache-2.0
"""A claim on a folder in a bucket, which has no locks: an object that its holder renews.

An object there has a generation, a number that every write changes, and the bucket accepts a write on
the condition that the generation is a certain one. So of two runs only one can make the object, or take
it over. Clocks of different hosts are never compared: a claim is dead if its generation has stayed the
same for as long as it says, by the waiting process's clock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import fsspec
from etils import epath

from digseg_jax.errors import USER_ERROR, UserError
from digseg_jax.io.json_file import check_keys, parse_object
from digseg_jax.io.storage import explained, remove_copies
from digseg_jax.log import log

SECONDS = "DIGSEG_JAX_LEASE"  # environment variable: how long the claim of a killed run lasts
DEFAULT_SECONDS = 60.0
LONGEST = 500.0  # the other processes of the run wait for ten minutes while one of them waits for it
_RENEWALS = 4  # in that time
_KEYS: dict[str, Any] = {"holder": str, "id": str, "since": str, "seconds": float}


@dataclasses.dataclass(frozen=True)
class _Claim:
    """What the object says, and its generation: "0" if there is none."""

    generation: str
    holder: str = ""
    id: str = ""
    since: str = ""
    seconds: float = DEFAULT_SECONDS


@contextlib.contextmanager
def leased(path: epath.Path) -> Iterator[None]:
    """Holds the claim whose object is `path` during the block.

    After a kill, the next run waits until the claim is dead: for the seconds that the environment
    variable `DIGSEG_JAX_LEASE` had at the killed run, 60 by default. A holder that finds another run's
    claim in place of its own, say after a long sleep, ends at once, so that two never write.

    Raises:
      UserError: another run holds it; the message has its process, host and start.
    """
    mine = _new_claim()
    with explained(path, "cannot be claimed"):
        held = _acquire(path, mine)

    # Renew in the background: the loop may compile, or evaluate, for minutes.
    ended = threading.Event()
    renewal = threading.Thread(target=_renew, args=(path, held, ended), daemon=True)
    renewal.start()
    try:
        yield
    finally:
        ended.set()
        renewal.join()
        with contextlib.suppress(Exception):  # an object left behind dies by itself
            _request("DELETE", path, generation=_read(path, mine.id).generation)


def _new_claim() -> _Claim:
    """A claim of this process.

    Raises:
      UserError: the environment variable is not a positive number.
    """
    text = os.environ.get(SECONDS, str(DEFAULT_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1.0 <= seconds <= LONGEST:
        raise UserError(f"{SECONDS}={text}: expected seconds, from 1 to {LONGEST:.0f}")

    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    return _Claim("0", holder, uuid.uuid4().hex, now, seconds)


def _acquire(path: epath.Path, mine: _Claim) -> _Claim:
    """Writes the claim, once no living one is there; returns it with its generation."""
    found = _read(path)
    since, told = time.monotonic(), False
    while True:
        # Nobody's, or dead: the condition lets only one of several that wait succeed.
        free = found.generation == "0" or time.monotonic() - since > found.seconds
        if free and (held := _write(path, mine, found.generation)):
            return held

        if not free and not told:
            log.info(
                "%s: claimed by %s since %s; it will be taken over after %.0f s without a sign of life",
                path, found.holder, found.since, found.seconds,
            )  # fmt: skip
            told = True

        # A new generation is a sign of life.
        time.sleep(min(found.seconds / _RENEWALS / 2, 5.0))
        now = _read(path)
        if now.generation not in (found.generation, "0"):
            raise UserError(
                f"--workdir={path.parent}: {now.holder} trains there since {now.since}; wait for it, "
                "end it, or use another --workdir"
            )
        if now.generation != found.generation:
            found, since = now, time.monotonic()


def _renew(path: epath.Path, held: _Claim, ended: threading.Event) -> None:
    """Writes the claim again and again until `ended`; ends the process if another run has taken it."""
    while not ended.wait(held.seconds / _RENEWALS):
        # A bucket that does not answer for a while does not end the claim.
        with contextlib.suppress(Exception):
            if written := _write(path, held, held.generation):
                held = written
                continue
            now = _read(path)
            if now.generation != "0":
                _give_way(path, held, now)

            # The object was removed, and no other process has claimed the folder since.
            held = dataclasses.replace(held, generation="0")


def _give_way(path: epath.Path, held: _Claim, other: _Claim) -> None:
    """Ends this process at once: anything that it still wrote would be mixed with the other's files."""
    sys.stderr.write(
        f"error: --workdir={path.parent}: this run gave no sign of life for {held.seconds:.0f} s, so "
        f"{other.holder} took the folder over; it ends without saving\n"
    )
    sys.stderr.flush()
    remove_copies()
    os._exit(USER_ERROR)


def _write(path: epath.Path, claim: _Claim, generation: str) -> _Claim | None:
    """Replaces the object of a generation by a claim; None if it is another one's by now."""
    values = {key: value for key, value in dataclasses.asdict(claim).items() if key in _KEYS}
    try:
        answer = _request("POST", path, generation=generation, data=json.dumps(values).encode())
        return dataclasses.replace(claim, generation=str(answer["generation"]))
    except FileExistsError:  # the client's name for a condition that does not hold
        pass

    # The client repeats a request whose answer was lost: then the other write was this one.
    now = _read(path)
    return now if now.id == claim.id else None


def _read(path: epath.Path, owner: str = "") -> _Claim:
    """Reads the object; generation "0" if there is none, or with `owner` if it is another's."""
    try:
        headers, content = _request("GET", path)
    except FileNotFoundError:
        return _Claim("0")

    # Whatever its content, it counts as held until it has not changed for long enough.
    names = {key.lower(): value for key, value in headers.items()}
    generation = str(names["x-goog-generation"])
    try:
        values = parse_object(content)
        check_keys(values, _KEYS)
        claim = _Claim(generation, **{key: values[key] for key in _KEYS})
    except ValueError:
        claim = _Claim(generation, holder="another program")
    return claim if not owner or claim.id == owner else _Claim("0")


def _request(method: str, path: epath.Path, generation: str = "", data: bytes | None = None) -> Any:
    """Sends one request about the object; `generation` is the condition."""
    bucket, _, name = os.fspath(path).partition("://")[2].partition("/")
    condition = {"ifGenerationMatch": generation} if generation else {}
    client = fsspec.filesystem("gs")

    # The client's own paths have no conditions; its `call` adds address, credentials and repeats.
    if method == "POST":
        place = f"{client._location}/upload/storage/v1/b/{bucket}/o"
        options = {"uploadType": "media", "name": name, "json_out": True}
        return client.call(method, place, data=data, **options, **condition)
    options = {"alt": "media"} if method == "GET" else {}
    return client.call(method, "b/{}/o/{}", bucket, name, **options, **condition)
