# SPDX-License-Identifier: Apache-2.0
"""Exceptions for what a user can put right, and the program's exit statuses."""

from __future__ import annotations

import difflib
import errno
import re
import socket
from collections.abc import Iterable

# Exit statuses of `main`, beside 0; after PREEMPTED the scripts of launch/ start the run again, after
# USER_ERROR and OVER_BUDGET they do not. A process that is aborted because another one of its run ended
# has 134.
CRASH = 1
USER_ERROR = 2  # refused, with one line that says why
OVER_BUDGET = 3  # does not fit: a program of --mode=compile, or a device's or the host's memory
INTERRUPTED = 130  # Ctrl-C where nothing is to be saved: 128 + SIGINT, the shells' convention
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: preempted, or ended by a `Transient`; start it again

# How errors of JAX, tensorstore and the bucket's client say that a service or another process is gone
# for now: the status codes that mean this, and the words of the libraries that have none.
_PASSING_CODES = {408, 429, 500, 502, 503, 504}
# Classes of aiohttp (gcsfs), requests, urllib3, httpx (the hub's client), google.auth, http and ssl for
# a connection that was cut or not made; none of them is one of Python's own.
_PASSING_KINDS = frozenset((
    "ClientPayloadError", "ClientConnectionError", "ConnectionError", "Timeout", "ChunkedEncodingError",
    "ProtocolError", "MaxRetryError", "RetryError", "TimeoutError", "TransportError", "IncompleteRead",
    "SSLEOFError", "SSLZeroReturnError",
))  # fmt: skip
# The same from the system: no route, no network, a name server that does not answer, a network disk.
_PASSING_NUMBERS = (
    errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET,
    errno.ESTALE, socket.EAI_AGAIN,
)  # fmt: skip
_PASSING_WORDS = re.compile(
    r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED)\b"
    r"|[Cc]onnection (closed by peer|reset by peer|refused)|remote process exited"
    r"|CURL error\[(5|6|7|16|18|28|35|52|55|56|92)\]"  # no name, no connection, cut, too late
)


# Whoever has the id of an upload that has begun can finish it.
_SECRETS = re.compile(
    r"((?:upload_id|access_token|id_token|X-Goog-\w+|X-Amz-\w+|[Ss]ignature|api_?key|token)=|"
    r"[Bb]earer +)[^\s&'\"<>)]+|\b(hf_|ya29\.)[\w.-]{8,}"
)


class UserError(ValueError):
    """Bad input: the message names the thing, the place and the legal values, in one line.

    `main` prints it without a traceback and exits with status USER_ERROR.
    """


class DoesNotFit(UserError):
    """What does not fit into the memory of a device or of the host; `main` exits with OVER_BUDGET."""


class Transient(UserError):
    """A temporary fault: `main` prints it in one line and exits with PREEMPTED.

    These are: a process of the run that is late, was killed or cannot be reached; a bucket or hub that
    does not answer (statuses 408, 429 and 500 to 504, cut or refused connections, time limits).
    """


class Preempted(BaseException):
    """The machine wants its processes back; everything is saved. `main` exits with PREEMPTED.

    Like KeyboardInterrupt it is no `Exception`: a signal raises it inside whatever code is running, and
    what catches the errors of a damaged file or of a bucket must not take it for one of them.
    """


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the host has not enough memory."""
    refused = isinstance(error, OSError) and error.errno == errno.ENOMEM
    return refused or isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def passes(error: BaseException | None) -> bool:
    """Whether an error, or the one that caused it, is of the kinds that `Transient` lists."""
    if error is None:
        return False
    if isinstance(error, BrokenPipeError):  # the command's own output, which nobody reads any more
        return False
    if isinstance(error, Transient | ConnectionError | TimeoutError):
        return True

    # A certificate that is refused stays refused, though its error is one of a connection.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & _PASSING_KINDS and "certificate" not in str(error).lower():
        return True
    if isinstance(error, OSError) and error.errno in _PASSING_NUMBERS:
        return True

    # A status code says it exactly; without one, the words do.
    answer = getattr(error, "response", None)  # of requests, httpx and the hub's client
    code = getattr(error, "code", None) or getattr(error, "status", None)
    code = code or getattr(answer, "status_code", None)
    if str(code).isdigit():
        return int(str(code)) in _PASSING_CODES
    return bool(_PASSING_WORDS.search(str(error))) or passes(error.__cause__)


def without_secrets(text: str) -> str:
    """The text without what lets its reader act for the user: such parts of addresses, and tokens.

    Errors of buckets and hubs contain the address that was asked for.
    """
    return _SECRETS.sub(lambda found: f"{found[1] or found[2]}...", text)


def refusal(message: str, cause: BaseException | None) -> UserError:
    """The error with this message for what a library raised: `Transient` if the cause passes."""
    return Transient(message) if passes(cause) else UserError(message)


def nearest(name: str, legal: Iterable[str], n: int = 3) -> str:
    """A hint such as `; did you mean 'a', 'b'?`, or "" if no legal name is similar."""
    close = difflib.get_close_matches(name, list(legal), n=n, cutoff=0.5)
    return f"; did you mean {', '.join(repr(c) for c in close)}?" if close else ""
