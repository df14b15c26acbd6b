# SPDX-License-Identifier: Apache-2.0
"""Processes find each other, or each is told who is missing and where."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import socket
import struct
import threading
import time

import pytest
from pod import free_port
from tiny import one_line

from digseg_jax.errors import Transient, UserError
from digseg_jax.runtime import distributed
from digseg_jax.runtime.distributed import Cluster, find_cluster, start
from digseg_jax.runtime.rendezvous import _Call, roll_call, split_address


def call(address: str, names: list[int], of: int | list[int], timeout: float = 1.0) -> list[str]:
    """What each of the named processes is told; empty for success."""

    def one(name: int, count: int) -> str:
        try:
            roll_call(address, count, name, timeout)
            return ""
        except UserError as error:
            return one_line(error)

    counts = of if isinstance(of, list) else [of] * len(names)
    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        return list(pool.map(one, names, counts))


@pytest.fixture
def address():
    return f"127.0.0.1:{free_port()}"


def test_all_come_and_all_go_on(address):
    assert call(address, [0, 1, 2, 3], of=4, timeout=10) == [""] * 4


def test_process_0_may_be_the_last(address):
    later = threading.Timer(0.3, call, (address, [0], 2, 10.0))
    later.start()
    assert call(address, [1], of=2, timeout=10) == [""]
    later.join()


def test_every_process_is_told_who_is_missing_the_address_and_the_port(address):
    for message in call(address, [0, 2], of=4):
        assert "process 1, 3 of 4 did not come" in message
        assert address in message and "within 1 s" in message


def test_without_process_0_the_others_are_told_its_address(address):
    (message,) = call(address, [1], of=2)
    assert "process 0 cannot be reached at " + address in message
    assert "refused" in message


def test_a_host_that_does_not_exist_is_told():
    (message,) = call("no-such-host.invalid:1234", [1], of=2)
    assert "no-such-host.invalid:1234" in message and "process 0 cannot be reached" in message


def test_a_port_in_use_is_told_at_once(address):
    with socket.create_server(("", int(address.rsplit(":", 1)[1]))):
        began = time.monotonic()
        (message,) = call(address, [0], of=2, timeout=30)
    assert time.monotonic() - began < 5
    assert f"port {address.rsplit(':', 1)[1]} is in use" in message and address in message


@pytest.mark.parametrize(
    "text", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\xff\xfe\n", b"x" * 9000 + b"\n"],
    ids=["http", "not text", "long"],
)  # fmt: skip
def test_something_else_that_answers_at_the_port_is_told(address, text):
    with socket.create_server(("127.0.0.1", int(address.rsplit(":", 1)[1]))) as server:
        answer = threading.Thread(target=lambda: _reply(server, text))
        answer.start()
        (message,) = call(address, [1], of=2, timeout=5)
        answer.join()
    assert "something other than process 0 answers" in message and address in message


def _reply(server: socket.socket, text: bytes) -> None:
    peer, _ = server.accept()
    peer.recv(1000)
    with contextlib.suppress(OSError):  # it may have read enough
        peer.sendall(text)
    peer.close()


def connected(address: str) -> socket.socket:
    """A connection to process 0, as soon as it listens."""
    for _ in range(1000):
        with contextlib.suppress(OSError):
            return socket.create_connection(split_address(address))
        time.sleep(0.01)
    raise AssertionError("nobody listens")


def forged(**changes) -> bytes:
    """A line of somebody who knows the protocol, but not the run's token."""
    return json.dumps({"process": 1, "of": 2, "proof": "00"} | changes).encode() + b"\n"


@pytest.mark.parametrize(
    "text",
    [b"GET / HTTP/1.1\r\n\r\n\n", b"x" * 9000, forged(), forged(process=7), forged(process="a"),
     forged(of=10**9), b'{"process": 1, "of": 2}\n', b"[" * 4000 + b"\n"],
    ids=["http", "long", "forged", "number", "text", "count", "no proof", "deep"],
)  # fmt: skip
def test_strangers_do_not_disturb(address, text):
    """They come before process 1, so the roll call cannot be over when they do."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        zero = pool.submit(roll_call, address, 2, 0, 30.0, "secret")
        with connected(address) as stranger, connected(address), connected(address) as slow:
            slow.sendall(b"{")  # and no more
            with contextlib.suppress(OSError):  # it may have been closed
                stranger.sendall(text)
                stranger.recv(1000)
            began = time.monotonic()
            roll_call(address, 2, 1, 30.0, "secret")
            assert zero.result() is None
            assert time.monotonic() - began < 20


def test_a_byte_now_and_then_holds_nobody_past_the_deadline(address):
    over = threading.Event()

    def drip() -> None:
        with connected(address) as peer:
            while not over.wait(0.1):
                with contextlib.suppress(OSError):
                    peer.sendall(b"x")

    stranger = threading.Thread(target=drip)
    stranger.start()
    began = time.monotonic()
    (message,) = call(address, [0], of=2, timeout=1.5)
    assert "process 1 of 2 did not come" in message and time.monotonic() - began < 10
    over.set()
    stranger.join()


def test_a_process_of_another_run_is_told(address):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        zero = pool.submit(roll_call, address, 2, 0, 2.0, "secret")
        with pytest.raises(UserError, match="process 1 has another DIGSEG_JAX_TOKEN than process 0"):
            roll_call(address, 2, 1, 10.0, "another")
        with pytest.raises(Transient, match="process 1 of 2 did not come"):
            zero.result()


def test_process_0_listens_on_the_coordinators_address_only(address):
    with concurrent.futures.ThreadPoolExecutor() as pool:
        zero = pool.submit(call, address, [0], 2, 1.5)
        connected(address).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", split_address(address)[1]))
        assert "did not come" in zero.result()[0]


def test_what_is_late_passes_and_what_was_typed_wrong_does_not(address):
    with pytest.raises(Transient):
        roll_call(address, 2, 0, 0.2)
    with pytest.raises(Transient):
        roll_call(address, 2, 1, 0.2)
    assert not issubclass(UserError, Transient)


def test_one_that_died_after_it_came_keeps_nobody_from_being_told(address):
    def come_and_die() -> None:
        peer = connected(address)
        peer.sendall(forged(of=4, proof=_Call(address, "", 0, 4, "", 0.0).proof(1)))
        time.sleep(1.0)  # until it was read
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
        peer.close()

    dead = threading.Thread(target=come_and_die)
    dead.start()
    for message in call(address, [0, 2], of=4, timeout=6):
        assert "process 3 of 4 did not come" in message
    dead.join()


def test_different_numbers_of_processes_are_told(address):
    _, message = call(address, [0, 1], of=[2, 3], timeout=2)
    assert "process 1 was started as one of 3, process 0 as one of 2" in message


def test_two_processes_of_the_same_number_are_told(address):
    messages = call(address, [0, 1, 1], of=3, timeout=2)
    assert any("two processes say that they are number 1 of 3" in m for m in messages[1:])
    assert "process 2 of 3 did not come" in messages[0]


@pytest.mark.parametrize(
    "bad", ["host", "host:", ":80", "host:0", "host:65536", "host:http", "http://host:80"]
)
def test_an_address_without_a_port_is_refused(bad):
    with pytest.raises(UserError) as caught:
        split_address(bad)
    assert repr(bad) in one_line(caught.value) and "HOST:PORT" in str(caught.value)


def test_an_ipv6_address_has_brackets():
    assert split_address("[::1]:80") == ("::1", 80)


def test_the_three_flags_make_a_cluster():
    assert find_cluster("h:1", 4, 3, 1.0) == Cluster("h:1", 4, 3)


def test_a_process_on_its_own_has_none():
    assert find_cluster(None, None, None, 1.0) is None
    start(None)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("h:1", None, 0), "--num_processes"),
        ((None, 2, 1), "--coordinator"),
        ((None, None, 1), "--coordinator, --num_processes"),
        (("h:1", 2, 2), "numbered from 0 to 1"),
        (("h:1", 2, -1), "numbered from 0 to 1"),
        (("h:1", 0, 0), "numbered from 0 to 0"),
        (("h", 2, 0), "HOST:PORT"),
    ],
)
def test_flags_that_do_not_belong_together_are_refused(flags, told):
    with pytest.raises(UserError) as caught:
        find_cluster(*flags, 1.0)
    assert told in one_line(caught.value)


def test_slurm_tells_who_takes_part(monkeypatch):
    """The variables that srun sets for the second of four tasks on two nodes."""
    values = {
        "SLURM_JOB_ID": "12345", "SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "node[07-08]", "SLURM_STEP_NUM_TASKS": "4",
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    cluster = find_cluster(None, None, None, 1.0)
    assert (cluster.num_processes, cluster.process_id) == (4, 1)
    assert cluster.local_device_ids == (1,)
    host, port = split_address(cluster.address)
    assert host == "node07" and port > 1024


@pytest.mark.parametrize(
    ("fault", "passes"),
    [
        (RuntimeError("Failed to recognize coordinator address 'slice-0-0.run:8080'"), True),
        (ConnectionError("metadata.google.internal: refused"), True),
        (RuntimeError("Number of TPU workers does not fit"), False),
    ],
)
def test_a_process_0_that_is_late_is_no_final_error(monkeypatch, fault, passes):
    """A launcher starts the run again on 75, and never on 2."""

    def detect(*_):
        raise fault

    monkeypatch.setattr(distributed.ClusterEnv, "auto_detect_unset_distributed_params", detect)
    with pytest.raises(UserError, match="the others were not found") as caught:
        distributed._detect(1.0)
    assert isinstance(caught.value, Transient) == passes
