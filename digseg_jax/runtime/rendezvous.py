# SPDX-License-Identifier: Apache-2.0
"""A roll call of the processes over plain TCP, before JAX starts: JAX's own start aborts the process.

`jax.distributed.initialize` ends in a C++ abort when a process is missing and in a segmentation fault
when the port is taken; neither names the process, the address or the port. So process 0 first listens
on the coordinator's port until all processes have called, tells everybody the outcome, and leaves the
port to JAX. The messages are one JSON line each way; nothing in them is secret.
"""

from __future__ import annotations

import contextlib
import errno
import json
import socket
import time
from collections.abc import Callable
from typing import Any

from digseg_jax.errors import UserError

_GREETING = "digseg_jax"  # marks an answer as process 0's
_RETRY = 0.5  # seconds between attempts to reach process 0


def split_address(address: str) -> tuple[str, int]:
    """Splits "HOST:PORT" or "[IPV6]:PORT".

    Raises:
      UserError: no port, or none between 1 and 65535.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(
            f"coordinator address {address!r}: expected HOST:PORT, with a port from 1 to 65535"
        )
    return host.strip("[]"), int(port)


def roll_call(address: str, num_processes: int, process_id: int, timeout: float) -> None:
    """Returns on every process once all have called; process 0 must run at `address`.

    Args:
      address: HOST:PORT of process 0.
      num_processes: of the run.
      process_id: this process.
      timeout: seconds.

    Raises:
      UserError: names the missing processes, or why process 0 cannot be reached, with address and port.
    """
    host, port = split_address(address)
    deadline = time.monotonic() + timeout
    if process_id == 0:
        _listen(address, port, num_processes, deadline, timeout)
    else:
        _call(address, (host, port), num_processes, process_id, deadline, timeout)


def _listen(address: str, port: int, count: int, deadline: float, timeout: float) -> None:
    """Process 0: collects the others and tells each of them the outcome."""
    present: dict[int, socket.socket] = {}
    try:
        # Accept callers until all are there or the time is over.
        with _server(address, port) as server:
            while len(present) < count - 1 and (left := deadline - time.monotonic()) > 0:
                server.settimeout(left)
                try:
                    caller, _ = server.accept()
                except TimeoutError:
                    break
                _admit(caller, present, count)

        missing = sorted(set(range(1, count)) - present.keys())
        problem = ""
        if missing:
            names = ", ".join(map(str, missing))
            problem = (
                f"process {names} of {count} did not come to {address} within {timeout:.0f} s: start "
                "the same command there, and open that port between the hosts"
            )

        # Everybody gets the same message, so that each log names the missing ones.
        for caller in present.values():
            _tell(caller, problem)
        if problem:
            raise UserError(problem)
    finally:
        for caller in present.values():
            caller.close()


def _server(address: str, port: int) -> socket.socket:
    """A listening socket on every address of this host, IPv6 and IPv4 if it has both.

    Raises:
      UserError: the port is in use, or cannot be opened.
    """
    # Callers may use either family, whatever name the address has.
    options: dict[str, Any] = {}
    if socket.has_dualstack_ipv6():
        options = {"family": socket.AF_INET6, "dualstack_ipv6": True}

    try:
        return socket.create_server(("", port), backlog=512, **options)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"coordinator address {address}: port {port} is in use on this host; end the process "
                "that has it (an earlier run?), or choose another port"
            ) from error
        raise UserError(f"coordinator address {address}: {error}") from error


def _admit(caller: socket.socket, present: dict[int, socket.socket], count: int) -> None:
    """Registers the caller, or tells it why it cannot take part."""
    # Seconds: a silent caller must not keep the others waiting.
    caller.settimeout(5)
    try:
        said = json.loads(_line(caller))
        name, expected = int(said["process"]), int(said["of"])
    except (OSError, ValueError, KeyError, TypeError):  # a port scanner, or a caller that died
        caller.close()
        return

    problem = ""
    if expected != count:
        problem = f"process {name} was started as one of {expected}, process 0 as one of {count}"
    elif name in present and _alive(present[name]):
        problem = f"two processes say that they are number {name} of {count}"

    if problem:
        _tell(caller, problem)
        caller.close()
        return

    # The earlier connection is dead: that process was started again.
    if name in present:
        present[name].close()
    present[name] = caller


def _tell(caller: socket.socket, problem: str) -> None:
    """Sends the outcome, "" if all is well; one caller that died keeps it from nobody else."""
    with contextlib.suppress(OSError):
        caller.sendall(json.dumps({"is": _GREETING, "problem": problem}).encode() + b"\n")


def _alive(caller: socket.socket) -> bool:
    """True if the other end still holds the connection."""
    caller.setblocking(False)
    # A closed connection reads as b"", a living silent one would block.
    try:
        return caller.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        caller.setblocking(True)


def _call(
    address: str, place: tuple[str, int], count: int, name: int, deadline: float, timeout: float
) -> None:
    """Every other process: calls process 0 until it answers or the time is over."""

    def attempt() -> str | None:
        """Calls once; returns process 0's problem, "" if all is well."""
        with socket.create_connection(place, timeout=max(deadline - time.monotonic(), 0.1)) as peer:
            peer.settimeout(max(deadline - time.monotonic(), 0.1) + 10)  # its clock started later
            peer.sendall(json.dumps({"process": name, "of": count}).encode() + b"\n")
            # Whatever else listens there may answer with anything, of any length.
            try:
                said = json.loads(_line(peer))
                return said["problem"] if said["is"] == _GREETING else "not ours"
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"coordinator address {address}: something other than process 0 answers there; "
                    "choose another port"
                ) from None

    problem = _retry(attempt, address, deadline, timeout)
    if problem:
        raise UserError(problem)


def _retry(
    attempt: Callable[[], str | None], address: str, deadline: float, timeout: float
) -> str | None:
    """Repeats `attempt` until it returns, or the next try would be past the deadline.

    Raises:
      UserError: process 0 was not reached in time.
    """
    while True:
        try:
            return attempt()
        except OSError as error:
            if time.monotonic() + _RETRY > deadline:
                why = error.strerror or str(error) or type(error).__name__
                raise UserError(
                    f"process 0 cannot be reached at {address} within {timeout:.0f} s ({why}): is it "
                    "started, is this its address, and is that port open between the hosts?"
                ) from error
        time.sleep(_RETRY)


def _line(peer: socket.socket) -> str:
    """Reads one line of at most 4 kB.

    Raises:
      ValueError: the line is longer.
      ConnectionError: the other end closes before the line is complete.
    """
    received = b""
    while not received.endswith(b"\n"):
        if len(received) > 4096:
            raise ValueError("a line of more than 4 kB")
        part = peer.recv(1024)
        if not part:
            raise ConnectionError("the connection was closed without an answer")
        received += part
    return received.decode()
