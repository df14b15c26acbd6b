# SPDX-License-Identifier: Apache-2.0
"""Devices that are not there, to compile for.

`v5e:4x4` by the real TPU compiler, `cpu:8` by simulated CPU devices, and `h100:8` by simulated CPU
devices in the place of GPUs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
from typing import TYPE_CHECKING

from digseg_jax.errors import UserError
from digseg_jax.runtime import gpu
from digseg_jax.runtime.hardware import CHIPS, Chip

if TYPE_CHECKING:  # JAX must not be imported before `prepare`
    import jax

# Kinds of chips; GPUs are those with a compute capability.
TPUS = ("v4", "v5e", "v5p", "v6e")
GPUS = tuple(name for name, chip in CHIPS.items() if chip.capability)
LEGAL = (
    f"cpu:N, a TPU slice such as v5e:4x4, v5p:2x2x2, v6e:4x4 (kinds {', '.join(TPUS)}), or GPUs such "
    f"as h100:1, a100:8 (kinds {', '.join(GPUS)})"
)
# The smallest slice of each kind that the compiler knows; one of its chips stands for `v5e:1`.
ONE_CHIP = {"v4": "2x2x1", "v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2"}
MOST_SIMULATED = 4096  # JAX makes them one by one, a few thousand in seconds
RESERVED = 2**28  # bytes of a TPU's memory that its system keeps; v5e's compiler says 15.75 of 16 GiB


@dataclasses.dataclass(frozen=True)
class Described:
    """A device that is not there, with the properties that the choice of a program depends on."""

    platform: str
    device_kind: str
    compute_capability: str | None = None


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      text: what the user asked for.
      devices: what the compiler is given.
      chip: data sheet of the device; None for CPUs.
      hbm_bytes: memory of one device that a program may use; simulated CPUs share the machine's.
      place_of: the GPU in whose place the devices are; all measures are then estimates.
    """

    text: str
    devices: list[jax.Device]
    chip: Chip | None
    hbm_bytes: float
    place_of: Described | None = None

    @property
    def meant(self) -> list[jax.Device] | list[Described]:
        """The devices that the program is meant to run on."""
        return [self.place_of] if self.place_of else self.devices


def prepare(text: str) -> None:
    """Checks the text and sets the environment; must run before JAX is imported, which reads it.

    Raises:
      UserError: no such topology, or libtpu, the TPU compiler, is not installed.
    """
    kind, _ = _split(text)
    os.environ["JAX_PLATFORMS"] = "cpu"
    if kind not in TPUS:
        return
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={text}: needs the TPU compiler, which runs on any Linux machine: "
            'pip install "jax[tpu]" in an environment of its own; --topology=cpu:8 needs nothing'
        )

    # Do not search for TPUs, and let other processes use the compiler at the same time.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def _split(text: str) -> tuple[str, str]:
    """Kind and size, ("v5e", "4x4").

    Raises:
      UserError: anything else than a topology.
    """
    found = re.fullmatch(r"([a-z][a-z0-9-]*):([1-9]\d*(?:x[1-9]\d*){0,2})", text)
    if not found or found[1] not in ("cpu", *TPUS, *GPUS) or (found[1] not in TPUS and "x" in found[2]):
        raise UserError(f"--topology={text!r}: legal are {LEGAL}")
    if found[1] not in TPUS and int(found[2]) > MOST_SIMULATED:
        raise UserError(f"--topology={text}: at most {MOST_SIMULATED} simulated devices")
    return found[1], found[2]


def open_topology(text: str) -> Topology:
    """The devices of a topology; `prepare` must have run.

    Raises:
      UserError: the compiler does not know such a slice.
    """
    from jax.experimental import topologies

    kind, shape = _split(text)

    # Simulated CPUs, also in the place of GPUs.
    if kind == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Topology(text, simulated(text, int(shape)), None, memory / int(shape))
    chip = CHIPS[kind]
    if kind in GPUS:
        meant = Described("cuda", chip.kind, chip.capability)
        budget = chip.hbm_bytes * gpu.memory_share()
        return Topology(text, simulated(text, int(shape)), chip, budget, meant)

    # The compiler has no slice of one chip: take one of the smallest slice.
    one = set(shape.split("x")) == {"1"}
    name = ONE_CHIP[kind] if one else shape
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{name}")
    except Exception as error:  # libtpu's own errors have no common type
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--topology={text}: the TPU compiler rejects it ({reason}); legal: {LEGAL}"
        ) from error

    devices = list(found.devices)[: 1 if one else None]
    return Topology(text, devices, chip, chip.hbm_bytes - RESERVED)


def simulated(text: str, count: int) -> list[jax.Device]:
    """Simulated CPU devices.

    Raises:
      UserError: this process has started with fewer of them.
    """
    import jax

    with contextlib.suppress(RuntimeError):  # backend already initialized
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")[:count]
    if len(devices) < count:
        raise UserError(f"--topology={text}: this process has only {len(devices)} CPU devices")
    return devices
