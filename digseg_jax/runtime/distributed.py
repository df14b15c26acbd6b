# SPDX-License-Identifier: Apache-2.0
"""Runs several processes as one: starts, waits and agrees on errors, each within a time limit.

The processes find each other in one of two ways: by the three flags of `main` (--coordinator,
--num_processes, --process_id), or by what the machine knows (TPU pod slice, GKE, SLURM, MPI), which
JAX's own cluster detection reads. With neither, the process is alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

import jax

# JAX has no public names for its detected cluster, nor for a barrier with a time limit.
from jax._src import distributed as jax_distributed
from jax._src.clusters import ClusterEnv

from digseg_jax.errors import PREEMPTED, Transient, UserError, refusal
from digseg_jax.io.storage import remove_copies
from digseg_jax.log import log
from digseg_jax.runtime.rendezvous import TOKEN, roll_call, split_address

START_TIMEOUT = 50.0  # seconds, so that an error comes within a minute; longer if pods start one by one
BARRIER_TIMEOUT = 600.0  # seconds; the longest wait is for a host that reads weights
HEARTBEAT_TIMEOUT = 300  # seconds without a sign of life; a busy or suspended host is not dead yet


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a run, as one of them sees them.

    address: HOST:PORT where process 0 listens.
    num_processes: of the run.
    process_id: this process, from 0.
    local_device_ids: devices that belong to this process; None: all that it sees.
    """

    address: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None


def find_cluster(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: float
) -> Cluster | None:
    """The cluster that the flags or the machine describe; None for a process on its own.

    Args:
      coordinator: HOST:PORT of process 0, from the flag; None if not given, as for the next two.
      num_processes: from the flag.
      process_id: from the flag.
      timeout: seconds for the detection.

    Raises:
      UserError: some of the three flags without the others, or values that do not fit.
    """
    if not timeout > 0:
        raise UserError(f"--start_timeout={timeout}: must be above 0 seconds")

    # All three flags.
    if coordinator is not None and num_processes is not None and process_id is not None:
        split_address(coordinator)
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise UserError(
                f"--process_id={process_id} --num_processes={num_processes}: the processes are "
                f"numbered from 0 to {max(num_processes, 1) - 1}"
            )
        return Cluster(coordinator, num_processes, process_id)

    # Some of them, or none: then the machine may describe a cluster.
    given = {
        "coordinator": coordinator, "num_processes": num_processes, "process_id": process_id
    }  # fmt: skip
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) < 3:
        raise UserError(f"{', '.join(missing)}: missing; the three flags belong together")
    return _detect(timeout)


def _detect(timeout: float) -> Cluster | None:
    """The cluster that JAX detects; None if it finds none, or only this process.

    Raises:
      Transient: process 0 is late, or what describes the cluster does not answer.
      UserError: a cluster was found, but not its other processes.
    """
    try:
        address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(timeout)
        )
    except Exception as error:  # each kind of cluster raises its own exceptions
        told = (
            f"this looks like one process of several, but the others were not found ({error}); "
            "name them with --coordinator=HOST:PORT --num_processes=N --process_id=I"
        )
        # A pod of process 0 that starts late has no name yet when JAX looks for it.
        late = "recognize coordinator address" in str(error)
        raise (Transient(told) if late else refusal(told, error)) from error

    if address is None or count is None or index is None or count == 1:
        return None
    return Cluster(address, count, index, tuple(devices) if devices else None)


def start(cluster: Cluster | None, timeout: float = START_TIMEOUT) -> None:
    """Joins the cluster; call it before JAX touches a device. Does nothing for None or one process.

    Raises:
      UserError: names the missing processes or what cannot be reached, with address and port.
    """
    if cluster is None or cluster.num_processes == 1:
        return

    log.info(
        "process %d of %d; process 0 listens at %s",
        cluster.process_id, cluster.num_processes, cluster.address,
    )  # fmt: skip

    # First a roll call, whose errors name the process: JAX's own start would abort (see rendezvous).
    token = os.environ.get(TOKEN, "")
    roll_call(cluster.address, cluster.num_processes, cluster.process_id, timeout, token)
    jax.distributed.initialize(
        cluster.address,
        cluster.num_processes,
        cluster.process_id,
        local_device_ids=cluster.local_device_ids,
        # `find_cluster` has detected it already.
        cluster_detection_method="deactivate",
        initialization_timeout=max(int(timeout), 10),
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        shutdown_timeout_seconds=30,
    )


def leave(status: int) -> NoReturn:
    """Ends this process with `status`, without waiting for what may never end.

    A plain `sys.exit` would wait for the other processes, and for threads that still try to write.
    """
    if jax_distributed.global_state.client is not None:
        if status == PREEMPTED:  # all of them are on their way here
            with contextlib.suppress(UserError):
                barrier("the end", 60.0)
        if is_main():
            time.sleep(2.0)  # the others abort once process 0 is gone: let them say why

    # `os._exit` flushes and tidies nothing itself.
    remove_copies()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def is_main() -> bool:
    """True on the process that writes what only one process may write."""
    return jax.process_index() == 0


_uses: dict[str, int] = {}  # name -> how often a barrier of that name was used


def barrier(name: str, timeout: float = BARRIER_TIMEOUT) -> None:
    """Waits until every process has called it; returns at once for a process on its own.

    Raises:
      Transient: names the processes that did not come within `timeout` seconds.
    """
    client = jax_distributed.global_state.client
    if client is None:
        return

    # The service accepts each name once; all processes count alike, so their names agree.
    _uses[name] = _uses.get(name, 0) + 1
    try:
        client.wait_at_barrier(f"{name}:{_uses[name]}", int(timeout * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise Transient(f"waiting for {name}: {_absent(str(error), timeout)}") from error


def _absent(message: str, timeout: float) -> str:
    """Names the missing processes, read from the coordination service's message."""
    late = message.partition("timed out task names:")[2].partition("RPC:")[0]
    late = re.sub(r"/job:\w+/replica:\d+/task:", " ", late)

    names = ", ".join(dict.fromkeys(re.findall(r"\d+", late)))
    if names:
        return f"process {names} did not come within {timeout:.0f} s; see that process's log"
    return " ".join(message.split())[:400]


@contextlib.contextmanager
def together(name: str, timeout: float = BARRIER_TIMEOUT) -> Iterator[None]:
    """A block after which all processes continue, or all raise what any of them raised.

    Without it, one process that finds a fault would leave the others waiting for it.

    Args:
      name: what the block does, for the messages.
      timeout: seconds that processes wait for each other.

    Raises:
      UserError: this process's own, or another process's with its number.
    """
    client = jax_distributed.global_state.client
    problem: UserError | None = None
    try:
        yield
    except UserError as error:
        if client is None:
            raise
        problem = error
    if client is None:
        return

    # Exchange the messages through the coordination service, "" for success. The first letter says
    # whether the error is transient.
    me, _uses[name] = jax.process_index(), _uses.get(name, 0) + 1
    folder = f"together/{name}:{_uses[name]}"
    kind = "t" if isinstance(problem, Transient) else "u"
    client.key_value_set(f"{folder}/{me}", f"{kind}{problem}" if problem else "")
    barrier(name, timeout)

    said = {key.rsplit("/", 1)[1]: text for key, text in client.key_value_dir_get(folder) if text}
    if not said:
        return

    # Process 0 serves the messages: it must not leave before all have read them.
    barrier(f"{name}, its errors", timeout)

    # What may pass counts first, on every process: some would go on after another kind of error.
    passing = {name: text for name, text in said.items() if text[0] == "t"}
    if problem and (isinstance(problem, Transient) or not passing):
        raise problem
    said = passing or said
    name, message = next(iter(said.items()))
    kinds = {"t": Transient, "u": UserError}
    raise kinds[message[0]](f"process {name}: {message[1:]}")
