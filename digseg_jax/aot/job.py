# SPDX-License-Identifier: Apache-2.0
"""Compilation of a run's program for devices that are not there, and its needs: --mode=compile."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from functools import partial
from typing import Any

import jax

from digseg_jax.aot import cuda, hlo, programs, traffic
from digseg_jax.aot.advice import Needs, advise
from digseg_jax.aot.kernels import kernel_flops
from digseg_jax.aot.programs import FILES, Program
from digseg_jax.aot.shapes import Architecture
from digseg_jax.aot.table import as_text
from digseg_jax.aot.topology import Topology, open_topology
from digseg_jax.config.parse import to_dict, with_settings
from digseg_jax.config.schema import Config
from digseg_jax.errors import UserError
from digseg_jax.io.storage import AnyPath, check_writable, write_bytes, write_json
from digseg_jax.log import heartbeat, log
from digseg_jax.packages import versions_of
from digseg_jax.runtime import tpu
from digseg_jax.training.flops import step_flops
from digseg_jax.training.setup import Machine, set_up

# Suffixes of bytes in the compiler's messages, and two forms of its message about too little memory.
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
TOO_MUCH = (
    r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
    r"temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
)


def run(config: Config, topology: str, workdir: AnyPath) -> dict[str, Any]:
    """Compiles, and writes DIR/compile.json and compile.txt (compile_eval.* for the evaluation).

    Returns:
      The content of compile.json. `fits` is False if the program needs more memory than the device has.

    Raises:
      UserError: no such topology, a mesh or a batch that its devices do not divide, or a program that
        the compiler rejects for another reason than memory.
    """
    if config.task != "segmentation":
        raise UserError(f"--mode=compile: for segmenters only, config.task is {config.task!r}")

    check_writable(workdir)  # now, not after minutes of compilation

    # The configuration and the mesh, as a run on these devices would choose them.
    target = open_topology(topology)
    architecture = Architecture.of(config.model)
    if config.compile.per_device_batch and not config.compute.accumulation:
        config = with_settings(config, {"compute.accumulation": 1})  # as many images as were asked for
    machine = Machine(target.devices, target.meant, target.hbm_bytes, target.chip)
    build = partial(programs.abstract_task, architecture=architecture)
    setup = set_up(config, build, machine)
    config, mesh = setup.config, setup.mesh
    task = build(config)  # the same as setup.task, but with the chosen accumulation

    # Lower: JAX's own part, which needs no device.
    start = time.monotonic()
    lower = cuda.stand_in if target.place_of else programs.lower
    lowered = lower(task, architecture, mesh)
    lowered_after = time.monotonic() - start

    # Several programs make an evaluation, one a train step.
    name = "eval" if config.compile.program == "eval" else lowered[0].name
    images = lowered[0].images
    log.info(
        "compiling %s for %s: %d images a call, mesh %s; a full-size model takes minutes",
        " and ".join(p.name for p in lowered), topology, images, dict(mesh.shape),
    )  # fmt: skip

    # Compile, which takes minutes. Options are a run's own, except for the search for fast convolutions
    # and for the effort.
    platform = target.devices[0].platform
    quick = {} if config.compile.tuned else tpu.untuned(platform)
    more = quick | effort_options(config.compile.effort, target.devices[0])
    if target.place_of:
        more |= cuda.OPTIONS
    each = [compile_and_measure(p, target, more) for p in lowered]
    if target.place_of:
        with cuda.assumed_cudnn():
            temporaries = programs.temporary_bytes(task, architecture, mesh)
        each = cuda.estimates(each, temporaries, target.hbm_bytes)

    # Everything in bytes and seconds, per device unless the key says otherwise.
    result = {
        "topology": topology,
        "program": name,
        "chips": len(target.devices),
        "device_kind": target.meant[0].device_kind,
        "mesh": dict(mesh.shape),
        "images": images,
        "queries": sum(p.queries * p.calls for p in lowered if p.name in ("sample", "train", "unet")),
        "images_per_chip": images / programs.shards(mesh),
        "hbm_limit_bytes": target.hbm_bytes,
        "effort": config.compile.effort,
        "tuned": not quick,
        "compiler_options": {
            "on": (tpu.compiler_options(platform) or {}) | more,
            "left_out": tpu.refusals() if platform == "tpu" else {},
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
        },
        **combined(each, [p.calls for p in lowered]),
        "lower_seconds": round(lowered_after, 1),
    }

    # An evaluation lists its programs. A train step states the model's own FLOPs, for the MFU.
    if name == "eval":
        result["calls"] = {p.name: p.calls for p in lowered}
        result["programs"] = {p.name: m for p, m in zip(lowered, each, strict=True)}
    else:
        whole = step_flops(task, programs.train_batch(task, architecture, images))
        result["model_flops"] = whole / len(target.devices)
        # Another number than `images` where the devices do not divide the recipe's batch.
        given = config.compile.per_device_batch
        result["images_configured"] = images if given else config.train.batch_size
        result["parameter_bytes"] = 4 * programs.count(task.abstract)

    result |= roofline(result, target)

    # Over the memory: compute what would fit.
    if not result["fits"]:
        parts = (config.compute.accumulation or 1) if config.compile.program == "train" else 1
        needs = Needs(
            result["hbm_args_bytes"],
            result["hbm_temp_bytes"],
            max(1, math.ceil(result["images_per_chip"] / parts)),  # of a microbatch
            target.hbm_bytes,
        )
        with cuda.assumed_cudnn():
            result["advice"] = advise(task, architecture, mesh, needs)

    # With configuration and versions in the file, the compilation can be repeated.
    result["config"] = to_dict(config)
    result["versions"] = versions_of(("jax", "jaxlib", "libtpu", "flax"))
    text = as_text(result)
    log.info("%s\n%s", workdir / f"{FILES[name]}.json", text)  # first: no disk can refuse it
    write_json(workdir / f"{FILES[name]}.json", result)
    write_bytes(workdir / f"{FILES[name]}.txt", text.encode())
    return result


# measures that add up over programs and calls
SUMMED = (
    "flops", "bytes_accessed", "memory_bytes", "loop_flops", "kernel_flops", "loop_bytes",
    "collective_bytes",
)  # fmt: skip


def combined(measured: list[dict[str, Any]], calls: list[int]) -> dict[str, Any]:
    """Several programs as one: the memory of the one that needs most, and the work of all calls.

    calls: how often each program is called.
    """
    if len(measured) == 1 and calls == [1]:
        return measured[0]
    largest: dict[str, Any] = max(measured, key=lambda m: m["hbm_peak_bytes"])
    result = dict(largest)

    result["compile_seconds"] = round(sum(m["compile_seconds"] for m in measured), 1)
    result["fits"] = all(m["fits"] for m in measured)
    if not all("flops" in m for m in measured):
        return result
    for key in SUMMED:
        result[key] = sum(m[key] * n for m, n in zip(measured, calls, strict=True))
    result["collectives"] = _summed_collectives(measured, calls)
    return result


def _summed_collectives(measured: list[dict[str, Any]], calls: list[int]) -> dict[str, Any]:
    """Collectives by kind, summed over programs and calls."""
    total: dict[str, dict[str, Any]] = {}
    for found, times in zip(measured, calls, strict=True):
        for kind, values in found["collectives"].items():
            before = total.get(kind, dict.fromkeys(values, 0))
            total[kind] = {name: before[name] + times * value for name, value in values.items()}
    return total


def effort_options(value: float, device: jax.Device) -> dict[str, Any]:
    """Compiler options for an amount of XLA's effort for fast code; none for a run's own, which is 0.

    Since jax 0.12 there are only levels: O1 stands for all values below 0, O3 for all above.
    """
    if not value:
        return {}
    exact = {"exec_time_optimization_effort": value}
    if tpu.refusal(exact, device) is None:
        return exact

    return {"optimization_level": "O1" if value < 0 else "O3"}


def compile_and_measure(
    program: Program, target: Topology, options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Compiles a program and measures it on one device: bytes, FLOPs, collectives, large buffers.

    options: compiler options, in addition to those that the program was lowered with.

    Returns:
      The measures; for a program over the memory, how much it needs.

    Raises:
      UserError: the compiler rejects the program for another reason than memory.
    """
    start = time.monotonic()
    try:
        with heartbeat("compiling"):
            compiled = program.lowered.compile(options or None)
    except jax.errors.JaxRuntimeError as error:
        return over_budget(str(error)) | _seconds(start)
    seconds = _seconds(start)

    # XLA's own accounts, and what they leave out: loops, kernels, collectives.
    memory: Any = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    module = hlo.parse(compiled.as_text() or "")
    collectives = hlo.collectives(module, len(target.devices))
    more_flops, more_bytes = traffic.loop_corrections(module)
    kernels = kernel_flops(module)

    # Donated arguments are written over by results, which then take no memory of their own.
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    code = memory.generated_code_size_in_bytes
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + results + code + program.waiting
    return {
        "fits": peak <= target.hbm_bytes,
        "hbm_args_bytes": memory.argument_size_in_bytes,
        "hbm_temp_bytes": memory.temp_size_in_bytes,
        "hbm_result_bytes": results,  # without those written over donated arguments
        "hbm_code_bytes": code,
        "hbm_waiting_bytes": program.waiting,
        "hbm_peak_bytes": peak,
        "flops": cost.get("flops", 0.0) + more_flops + kernels,
        "bytes_accessed": cost.get("bytes accessed", 0.0) + more_bytes,
        "memory_bytes": traffic.memory_traffic(module),  # counted here, main memory only
        # the parts of flops and bytes_accessed that XLA's own count leaves out
        "loop_flops": more_flops,
        "kernel_flops": kernels,
        "loop_bytes": more_bytes,
        "collective_bytes": sum(c.bytes for c in collectives.values()),
        "collectives": {kind: dataclasses.asdict(c) for kind, c in collectives.items()},
        "largest_buffers": [dataclasses.asdict(b) for b in hlo.largest_buffers(module)],
        **seconds,
    }


def _seconds(start: float) -> dict[str, float]:
    """Seconds since `start`, as an entry of the result."""
    return {"compile_seconds": round(time.monotonic() - start, 1)}


def over_budget(message: str) -> dict[str, Any]:
    """Measures from the TPU compiler's message about a program that does not fit.

    Raises:
      UserError: it failed for another reason.
    """
    used = next(filter(None, (re.search(form, message) for form in TOO_MUCH)), None)
    if not used:
        raise UserError(f"the compiler rejects the program: {' '.join(message.split())[:600]}")

    # The message states the total and the arguments; the rest are temporaries.
    needed = float(used[1]) * UNITS[used[2]]
    arguments = _said(message, "arguments")
    return {
        "fits": False,
        "hbm_args_bytes": arguments,
        "hbm_temp_bytes": needed - arguments,
        "hbm_peak_bytes": needed,
        "hbm_limit_bytes": float(used[3]) * UNITS[used[4]],
        "compiler_message": message[:8000],
    }


def _said(message: str, what: str) -> float:
    """Bytes behind a word of the message such as `arguments    2.65G`; 0 if it is not there."""
    found = re.search(rf"\b{what}\b[^\d\n]*([\d.]+)([KMGT]?)", message)
    return float(found[1]) * UNITS[found[2]] if found else 0.0


def roofline(result: dict[str, Any], target: Topology) -> dict[str, Any]:
    """Lower bounds of one call's time, in seconds: computing, memory traffic, traffic between chips.

    The longest one is the bound for the whole call; with model FLOPs it also bounds the
    utilization (MFU). Beside it stands the time of the collectives beside which nothing runs,
    by the compiler's schedule.

    Returns:
      Entries of the result; empty for an unknown chip or a program that does not fit.
    """
    chip = target.chip
    if chip is None or "flops" not in result:
        return {}
    seconds = {
        "compute": result["flops"] / chip.flops,
        "memory": result["memory_bytes"] / chip.hbm_bandwidth,
        "collectives": result["collective_bytes"] / chip.ici_bandwidth,
    }

    # In the place of a GPU the traffic is another compiler's, and too large for a bound.
    if target.place_of:
        del seconds["memory"]
    longest = max(seconds.values())
    exposed = sum(c["bytes"] - c["overlapped_bytes"] for c in result["collectives"].values())
    values = {
        "roofline_seconds": seconds,
        "roofline_bound": max(seconds, key=lambda part: seconds[part]),
        "roofline_images_per_second_per_chip": result["images"] / result["chips"] / longest,
        "exposed_collective_seconds": exposed / chip.ici_bandwidth,
        "chip_source": chip.source,
    }

    if "model_flops" in result:
        values["mfu_bound"] = result["model_flops"] / (longest * chip.flops)
    return values
