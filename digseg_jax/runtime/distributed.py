# SPDX-License-Identifier: Apache-2.0
"""Several processes as one run: start within a time limit, agree on errors, wait with a time limit.

The processes find each other in one of two ways: the three flags of `main` (--coordinator,
--num_processes, --process_id), or what the machine says of itself (TPU pod slice, GKE, SLURM, MPI),
which JAX's own cluster detection reads. With neither, the process is alone.
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

# JAX has no public names for its detected cluster or for a barrier with a time limit
from jax._src import distributed as jax_distributed
from jax._src.clusters import ClusterEnv

from digseg_jax.errors import PREEMPTED, UserError
from digseg_jax.log import log
from digseg_jax.runtime.rendezvous import roll_call, split_address

START_TIMEOUT = 50.0  # seconds; an error within a minute. Longer where pods start one by one
BARRIER_TIMEOUT = 600.0  # seconds; the slowest thing waited for is a host that reads weights
HEARTBEAT_TIMEOUT = 300  # seconds without a sign of life; a busy or suspended host is not dead yet


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where process 0 listens, how many processes there are, and which one this is."""

    address: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None


def find_cluster(
    coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: float
) -> Cluster | None:
    """The cluster that the flags or the machine describe; None for a process on its own.

    Raises:
      UserError: some of the three flags without the others, or numbers that do not fit.
    """
    given = {
        "coordinator": coordinator, "num_processes": num_processes, "process_id": process_id
    }  # fmt: skip
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if not missing:
        split_address(coordinator)
        if num_processes < 1 or not 0 <= process_id < num_processes:
            raise UserError(
                f"--process_id={process_id} --num_processes={num_processes}: the processes are "
                f"numbered from 0 to {max(num_processes, 1) - 1}"
            )
        return Cluster(coordinator, num_processes, process_id)
    if len(missing) < 3:
        raise UserError(f"{', '.join(missing)}: missing; the three flags belong together")
    return _detect(timeout)


def _detect(timeout: float) -> Cluster | None:
    try:
        address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(timeout)
        )
    except Exception as error:  # what the detection of each kind of cluster raises is not listed
        raise UserError(
            f"this looks like one process of several, but the others are not known ({error}); "
            "tell with --coordinator=HOST:PORT --num_processes=N --process_id=I"
        ) from error
    if address is None or count is None or index is None or count == 1:
        return None
    return Cluster(address, count, index, tuple(devices) if devices else None)


def start(cluster: Cluster | None, timeout: float = START_TIMEOUT) -> None:
    """Joins the cluster; to be called before JAX touches a device. None: nothing to do.

    Raises:
      UserError: who is missing or what cannot be reached, with the address and the port.
    """
    if cluster is None or cluster.num_processes == 1:
        return
    log.info(
        "process %d of %d; process 0 listens at %s",
        cluster.process_id, cluster.num_processes, cluster.address,
    )  # fmt: skip
    roll_call(cluster.address, cluster.num_processes, cluster.process_id, timeout)
    jax.distributed.initialize(
        cluster.address,
        cluster.num_processes,
        cluster.process_id,
        local_device_ids=cluster.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=max(int(timeout), 10),
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        shutdown_timeout_seconds=30,
    )


def leave(status: int) -> NoReturn:
    """Ends this process with `status`, without waiting for what may never end.

    A plain `sys.exit` would wait for the other processes and for threads that still try to write.
    """
    if jax_distributed.global_state.client is not None:
        if status == PREEMPTED:  # all of them are on their way here
            with contextlib.suppress(UserError):
                barrier("the end", 60.0)
        if is_main():
            time.sleep(2.0)  # the others are aborted once process 0 is gone: let them say why
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def is_main() -> bool:
    """Whether this process writes what only one process may write."""
    return jax.process_index() == 0


_uses: dict[str, int] = {}


def barrier(name: str, timeout: float = BARRIER_TIMEOUT) -> None:
    """Waits until every process is here; at once for a process on its own.

    Raises:
      UserError: the processes that did not come within `timeout` seconds.
    """
    client = jax_distributed.global_state.client
    if client is None:
        return
    _uses[name] = _uses.get(name, 0) + 1  # every barrier needs a name of its own
    try:
        client.wait_at_barrier(f"{name}:{_uses[name]}", int(timeout * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"waiting for {name}: {_absent(str(error), timeout)}") from error


def _absent(message: str, timeout: float) -> str:
    """The missing processes' numbers, out of the coordination service's message."""
    late = message.partition("timed out task names:")[2].partition("RPC:")[0]
    late = re.sub(r"/job:\w+/replica:\d+/task:", " ", late)
    names = ", ".join(dict.fromkeys(re.findall(r"\d+", late)))
    if names:
        return f"process {names} did not come within {timeout:.0f} s; see that process's log"
    return " ".join(message.split())[:400]


@contextlib.contextmanager
def together(name: str, timeout: float = BARRIER_TIMEOUT) -> Iterator[None]:
    """A block after which all processes go on, or all raise what any of them raised.

    Without it, one process that finds a fault would leave the others waiting for it.

    Raises:
      UserError: of this process, or of another one, with its number.
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
    me, _uses[name] = jax.process_index(), _uses.get(name, 0) + 1
    folder = f"together/{name}:{_uses[name]}"
    client.key_value_set(f"{folder}/{me}", str(problem) if problem else "")
    barrier(name, timeout)
    said = {key.rsplit("/", 1)[1]: text for key, text in client.key_value_dir_get(folder) if text}
    if not said:
        return
    barrier(f"{name}, its errors", timeout)  # process 0 holds the messages: it must not leave first
    if problem:
        raise problem
    name, message = next(iter(said.items()))
    raise UserError(f"process {name}: {message}")
