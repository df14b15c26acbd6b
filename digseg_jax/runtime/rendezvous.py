# SPDX-License-Identifier: Apache-2.0
"""A roll call of the processes over plain TCP, before JAX starts: JAX's own start aborts the process.

`jax.distributed.initialize` ends in a C++ abort when a process is missing and in a segmentation fault
when the port is taken; neither names the process, the address or the port. So process 0 first listens
on the coordinator's port until all processes have called, sends every process the outcome, and leaves
the port to JAX. The messages are one JSON line each way. Each proves that its sender knows the run's
token, which the launch scripts make up and hand to every process; without a token, anyone can call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import hmac
import ipaddress
import json
import selectors
import socket
import time
from collections.abc import Callable
from typing import Any

from digseg_jax.errors import Transient, UserError
from digseg_jax.log import log

TOKEN = "DIGSEG_JAX_TOKEN"  # environment variable with a secret that the processes of a run share
_GREETING = "digseg_jax"  # marks an answer as process 0's
_RETRY = 0.5  # seconds between attempts to reach process 0
_PATIENCE = 5.0  # seconds that a caller has for its line
_LONGEST = 4096  # bytes of a line


def split_address(address: str) -> tuple[str, int]:
    """Splits "HOST:PORT" or "[IPV6]:PORT".

    Raises:
      UserError: no port, none between 1 and 65535, or a URL.
    """
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(
            f"coordinator address {address!r}: expected HOST:PORT, with a port from 1 to 65535"
        )
    return host.strip("[]"), int(port)


def roll_call(
    address: str, num_processes: int, process_id: int, timeout: float, token: str = ""
) -> None:
    """Returns on every process once all have called; process 0 must run at `address`.

    Args:
      address: HOST:PORT of process 0.
      num_processes: of the run.
      process_id: this process.
      timeout: seconds.
      token: secret that the processes of the run share; callers without it do not count.

    Raises:
      Transient: names the missing processes, or why process 0 cannot be reached, with address and port.
      UserError: the port is in use, or the processes were started with different counts or tokens.
    """
    call = _Call(address, *split_address(address), num_processes, token, timeout)
    if process_id == 0:
        _listen(call)
    else:
        _answer_to(call, process_id)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A roll call as every process knows it; fields as in `roll_call`, and the split address."""

    address: str
    host: str
    port: int
    count: int
    token: str
    timeout: float
    began: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds until the time is over."""
        return self.began + self.timeout - time.monotonic()

    def proof(self, sender: int) -> str:
        """Proves that process `sender` knows the token, without revealing it."""
        text = f"{_GREETING} process {sender} of {self.count}"
        return hmac.new(self.token.encode(), text.encode(), hashlib.sha256).hexdigest()


def _listen(call: _Call) -> None:
    """Process 0: collects the others and sends each of them the outcome."""
    present: dict[int, socket.socket] = {}
    try:
        with contextlib.ExitStack() as stack:
            _collect(call, [stack.enter_context(s) for s in _servers(call)], present)

        missing = sorted(set(range(1, call.count)) - present.keys())
        problem = ""
        if missing:
            names = ", ".join(map(str, missing))
            problem = (
                f"process {names} of {call.count} did not come to {call.address} within "
                f"{call.timeout:.0f} s: start the same command there, and open that port between the "
                "hosts"
            )

        # Everybody gets the same message, so that each log names the missing ones.
        for caller in present.values():
            _tell(call, caller, problem, passes=True)
        if problem:
            raise Transient(problem)
    finally:
        for caller in present.values():
            caller.close()


def _servers(call: _Call) -> list[socket.socket]:
    """Sockets that listen on the coordinator's address, and on no other interface of this host.

    Raises:
      UserError: the port is in use, or cannot be opened.
    """
    servers = []
    try:
        for family, host in _own_addresses(call.host):
            with contextlib.suppress(_NotHere):
                servers.append(_server(family, host, call))

        # A name that stands for another machine, such as a gateway: callers may come by any interface.
        if not servers:
            log.warning("%s: not an address of this host, so process 0 listens on all", call.address)
            both = socket.has_dualstack_ipv6()
            servers.append(_server(socket.AF_INET6 if both else socket.AF_INET, "", call, both=both))
    except UserError:
        for server in servers:
            server.close()
        raise
    return servers


def _own_addresses(host: str) -> set[tuple[int, str]]:
    """Families and numeric addresses of a host; none of the loopback if its name hides others.

    Many systems give their own name an address of the loopback (127.0.1.1), where no other host calls.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return set()
    addresses = {(int(family), str(place[0])) for family, _, _, _, place in found}

    # Named as such, the loopback is meant.
    named = host == "localhost" or any(host == numeric for _, numeric in addresses)
    if named:
        return addresses
    return {(f, a) for f, a in addresses if not ipaddress.ip_address(a.partition("%")[0]).is_loopback}


class _NotHere(Exception):
    """The address belongs to another host."""


def _server(family: int, host: str, call: _Call, *, both: bool = False) -> socket.socket:
    """A listening socket; both: for IPv4 too. Raises _NotHere, or UserError if it cannot be opened."""
    try:
        server = socket.create_server(
            (host, call.port), family=family, backlog=512, dualstack_ipv6=both
        )
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise _NotHere from error
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"coordinator address {call.address}: port {call.port} is in use on this host; end the "
                "process that has it (an earlier run?), or choose another port"
            ) from error
        raise UserError(f"coordinator address {call.address}: {error}") from error
    server.setblocking(False)
    return server


@dataclasses.dataclass
class _Stranger:
    """A caller whose line is not complete yet."""

    since: float
    said: bytes = b""


def _collect(call: _Call, servers: list[socket.socket], present: dict[int, socket.socket]) -> None:
    """Adds callers to `present` by their number, until all are there or the time is over.

    All connections are read concurrently: a silent or a slow one delays no other.
    """
    with selectors.DefaultSelector() as selector:
        for server in servers:
            selector.register(server, selectors.EVENT_READ)

        while len(present) < call.count - 1 and call.left > 0:
            for key, _ in selector.select(min(call.left, 0.5)):
                peer: Any = key.fileobj  # a socket
                if key.data is None:
                    _accept(peer, selector)
                    continue

                # The line is complete, or will not be.
                if (line := _heard(peer, key.data)) is not None:
                    selector.unregister(peer)
                    _admit(call, peer, line, present)
            _close_slow(selector)

        # Those whose lines are not complete did not come in time.
        for peer in [k.fileobj for k in selector.get_map().values() if k.data is not None]:
            peer.close()


def _accept(server: Any, selector: selectors.BaseSelector) -> None:
    """Takes the next caller, whose line is still to come."""
    with contextlib.suppress(OSError):  # it is gone already, or there are too many
        caller, _ = server.accept()
        caller.setblocking(False)
        selector.register(caller, selectors.EVENT_READ, _Stranger(time.monotonic()))


def _heard(caller: Any, stranger: _Stranger) -> bytes | None:
    """Reads what has come from a caller: its whole line; b"" if there will be none; None to wait."""
    try:
        part = caller.recv(_LONGEST)
    except BlockingIOError:
        return None
    except OSError:
        return b""

    stranger.said += part
    if not part or len(stranger.said) > _LONGEST:
        return b""
    return stranger.said if stranger.said.endswith(b"\n") else None


def _close_slow(selector: selectors.BaseSelector) -> None:
    """Closes callers whose line has not come within _PATIENCE seconds."""
    now = time.monotonic()
    for key in list(selector.get_map().values()):
        if key.data is not None and now - key.data.since > _PATIENCE:
            selector.unregister(key.fileobj)
            key.fileobj.close()  # type: ignore[union-attr]  # a socket


def _admit(call: _Call, caller: socket.socket, line: bytes, present: dict[int, socket.socket]) -> None:
    """Registers the caller that sent `line`, or answers why it cannot take part."""
    caller.setblocking(True)
    caller.settimeout(_PATIENCE)
    try:
        said = json.loads(line)
        name, expected, proof = int(said["process"]), int(said["of"]), str(said["proof"])
    except (ValueError, KeyError, TypeError, RecursionError):  # a port scanner, or one that died
        caller.close()
        return

    # The count first: a proof is made for it.
    problem = ""
    if expected != call.count:
        problem = f"process {name} was started as one of {expected}, process 0 as one of {call.count}"
    elif not hmac.compare_digest(proof.encode(), call.proof(name).encode()):
        problem = f"process {name} has another {TOKEN} than process 0; it belongs to another run"
    elif not 0 < name < call.count:
        problem = f"process {name}: the others are numbered from 1 to {call.count - 1}"
    elif name in present and _alive(present[name]):
        problem = f"two processes say that they are number {name} of {call.count}"

    if problem:
        _tell(call, caller, problem)
        caller.close()
        return

    # The earlier connection is dead: that process was started again.
    if name in present:
        present[name].close()
    present[name] = caller


def _tell(call: _Call, caller: socket.socket, problem: str, *, passes: bool = False) -> None:
    """Sends the outcome, "" if all is well; a caller that has died does not keep it from the others."""
    said = {"is": _GREETING, "problem": problem, "passes": passes, "proof": call.proof(0)}
    with contextlib.suppress(OSError):
        caller.sendall(json.dumps(said).encode() + b"\n")


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


def _answer_to(call: _Call, name: int) -> None:
    """Every other process: calls process 0 until it answers or the time is over."""

    def attempt() -> dict[str, Any]:
        """Calls once; returns process 0's answer."""
        place = (call.host, call.port)
        with socket.create_connection(place, timeout=max(call.left, 0.1)) as peer:
            said = {"process": name, "of": call.count, "proof": call.proof(name)}
            peer.sendall(json.dumps(said).encode() + b"\n")

            # Whatever else listens there may answer with anything, of any length.
            try:
                answer = json.loads(_line(peer, max(call.left, 0.1) + 10))  # its clock started later
                proved = hmac.compare_digest(str(answer["proof"]), call.proof(0))
                if answer["is"] != _GREETING or not (answer["problem"] or proved):
                    raise ValueError("not an answer of process 0")
                return answer
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(
                    f"coordinator address {call.address}: something other than process 0 answers "
                    "there; choose another port"
                ) from None

    answer = _retry(attempt, call)
    if answer["problem"]:
        raise (Transient if answer.get("passes") else UserError)(str(answer["problem"]))


def _retry(attempt: Callable[[], dict[str, Any]], call: _Call) -> dict[str, Any]:
    """Repeats `attempt` until it returns, or the next try would be past the deadline.

    Raises:
      Transient: process 0 was not reached in time.
    """
    while True:
        try:
            return attempt()
        except OSError as error:
            if call.left < _RETRY:
                why = error.strerror or str(error) or type(error).__name__
                raise Transient(
                    f"process 0 cannot be reached at {call.address} within {call.timeout:.0f} s "
                    f"({why}): is it started, is this its address, and is that port open between the "
                    "hosts?"
                ) from error
        time.sleep(_RETRY)


def _line(peer: socket.socket, patience: float) -> str:
    """Reads one line of at most 4 kB within `patience` seconds in all.

    Raises:
      ValueError: the line is longer.
      ConnectionError: the other end closes before the line is complete.
      TimeoutError: the line was not complete in time.
    """
    end, received = time.monotonic() + patience, b""
    while not received.endswith(b"\n"):
        if len(received) > _LONGEST:
            raise ValueError("a line of more than 4 kB")
        peer.settimeout(max(end - time.monotonic(), 0.001))
        part = peer.recv(1024)
        if not part:
            raise ConnectionError("the connection was closed without an answer")
        received += part
    return received.decode()
