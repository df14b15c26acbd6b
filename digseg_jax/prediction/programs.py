# SPDX-License-Identifier: Apache-2.0
"""The two compiled programs behind every mask: sampling mask latents, and reading masks from them.

A call takes a fixed number of views (crops of one size), each with a fixed number of queries. Shapes
therefore depend on the configuration alone: neither an image's size nor the vocabulary compiles
anything. Views are split over the data and fsdp axes of the mesh. With several processes every one of
them makes the same calls, hands over its own views and gets back their results only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from digseg_jax.arraytypes import Array, Bool, Float, Int, Params, UInt8
from digseg_jax.config.sampling import EStep
from digseg_jax.log import heartbeat
from digseg_jax.runtime.collectives import local_rows
from digseg_jax.runtime.distributed import barrier
from digseg_jax.runtime.sharding import BATCH, data_share, infer_shardings, on_mesh, place, place_batch
from digseg_jax.runtime.tpu import compiler_options
from digseg_jax.segmentation import ensemble
from digseg_jax.training.tasks.segmentation import SegmentationTask

COMPILE_TIMEOUT = 3600.0  # seconds that the first process to have compiled waits for the last


class Programs:
    """A task's weights on a mesh, and its programs, each compiled once for each shape.

    Attributes:
        mesh: the devices.
        part, parts: this process feeds the `part`-th of `parts` equal shares of every call.
        shards: devices along the data and fsdp axes; a call's views are a multiple of them.
        compiled: programs compiled so far.
        seconds: time spent in calls so far, compilation excluded.
    """

    def __init__(self, task: SegmentationTask, params: Params, mesh: Mesh):
        self.task, self.mesh = task, mesh
        self.part, self.parts = data_share(mesh)
        self.shards = mesh.shape["data"] * mesh.shape["fsdp"]
        self.compiled, self.seconds = 0, 0.0
        self._programs: dict[Any, Callable[..., Any]] = {}

        # The state of a training lies on the mesh already; weights from a file are put there now.
        self.params = _placed(params, mesh)
        self.vae = _placed(task.frozen["vae"], mesh)

    def sample(
        self,
        crops: UInt8[np.ndarray, "n h w 3"],
        index: Int[np.ndarray, " n"],
        tokens: Float[np.ndarray, "n t l d"],
        mask: Bool[np.ndarray, "n t l"],
        root: Array,
        estep: EStep,
        *,
        mean: bool,
    ) -> Float[np.ndarray, "n k e h2 w2 c"]:
        """Denoised mask latents of this process's views.

        index: names each view in the draws of the initial noise. root: key of those draws. mean:
        return the mean over the members in place of all of them (e = 1).
        """
        rows = {"crops": crops, "index": index, "tokens": tokens, "mask": mask}
        program = partial(sample_latents, self.task, estep=estep, mean=mean)
        key = ("sample", estep, mean)
        return self._call(key, program, (self.params, self.vae, root), rows)

    def read(
        self,
        latents: Float[np.ndarray, "n k e h2 w2 c"],
        bias: Float[np.ndarray, "n q"],
        scale: float,
        *,
        size: tuple[int, int],
        decoder: str,
        rule: str,
        biased: bool = False,
        evidence: bool = False,
    ) -> dict[str, np.ndarray]:
        """Masks of this process's views: "probability" [n, q, h, w], float32.

        The k mask images show the q queries (see `segmentation.codec`). biased: return "alone" as well,
        the probabilities without the bias. evidence: return "evidence" [n, q, e, h, w] instead.

        decoder: "vae" or "probe" (see `SegmentationTask.read`); rule: see `ensemble.combine`.
        """
        program = partial(
            read_masks, self.task, size=size, decoder=decoder, rule=rule, biased=biased, raw=evidence
        )
        key = ("read", size, decoder, rule, biased, evidence)
        arguments = (self.vae, np.float32(scale))
        return self._call(key, program, arguments, {"latents": latents, "bias": bias})

    def agree_on_largest(self, *mine: int) -> tuple[int, ...]:
        """The largest of each number over all processes; every process must ask."""
        if jax.process_count() == 1:
            return mine
        from jax.experimental import multihost_utils

        every = np.asarray(multihost_utils.process_allgather(np.asarray(mine, np.int32)))
        return tuple(int(n) for n in every.reshape(-1, len(mine)).max(axis=0))

    def _call(
        self, key: tuple, program: Callable, shared: tuple[Any, ...], rows: dict[str, np.ndarray]
    ) -> Any:
        """Runs a program on shared arguments and this process's rows; returns its rows' results."""
        batch = place_batch(rows, self.mesh)
        shapes = tuple((name, x.shape, str(x.dtype)) for name, x in sorted(batch.items()))
        if (key, shapes) not in self._programs:
            self._programs[key, shapes] = self._compile(key[0], program, shared, batch)

        start = time.monotonic()
        out = jax.block_until_ready(self._programs[key, shapes](*shared, batch))
        self.seconds += time.monotonic() - start
        return jax.tree.map(local_rows, out)

    def _compile(
        self, name: str, program: Callable, shared: tuple[Any, ...], batch: dict[str, Array]
    ) -> Callable[..., Any]:
        platform = self.mesh.devices.flat[0].platform
        lowered = trace(program, shared, batch, self.mesh).lower(lowering_platforms=(platform,))
        with heartbeat(f"compiling: {name}"):
            compiled = lowered.compile(compiler_options(platform))
        self.compiled += 1

        # A collective gives up on a process that is late, and compilation takes uneven times.
        barrier("a compiled program", COMPILE_TIMEOUT)
        return compiled


def trace(program: Callable, shared: tuple[Any, ...], batch: Params, mesh: Mesh) -> jax.stages.Traced:
    """One of the programs below for these arguments (arrays or shapes)."""
    rows, whole = NamedSharding(mesh, BATCH), NamedSharding(mesh, P())
    # None: weights stay as they are placed.
    kept = tuple(None if isinstance(x, dict) else whole for x in shared)
    jitted = jax.jit(on_mesh(mesh, program), in_shardings=(*kept, rows), out_shardings=rows)
    return jitted.trace(*shared, batch)


def sample_latents(
    task: SegmentationTask,
    params: Params,
    vae: Params,
    root: Array,
    batch: Params,
    *,
    estep: EStep,
    mean: bool,
) -> Float[Array, "n k e h w c"]:
    """The program of `Programs.sample`."""
    frozen = {"vae": vae, "bank": {"tokens": batch["tokens"], "mask": batch["mask"]}}
    latents = task.sample(params, frozen, batch["crops"], batch["index"], estep, seed=root)
    return latents.mean(axis=2, keepdims=True) if mean else latents


def read_masks(
    task: SegmentationTask,
    vae: Params,
    scale: Array,
    batch: Params,
    *,
    size: tuple[int, int],
    decoder: str,
    rule: str,
    biased: bool,
    raw: bool,
) -> dict[str, Array]:
    """The program of `Programs.read`."""
    latents, bias = batch["latents"], batch["bias"]
    read = partial(task.read, {"vae": vae}, size=size, decoder=decoder)
    if raw:
        return {"evidence": read(latents)}

    def combined(evidence: Array, bias: Array) -> Array:
        return ensemble.probabilities(evidence, scale, bias, exclusive=task.codec.exclusive, rule=rule)

    # One member at a time where a mask image shows many queries and a mean is wanted.
    if bias.shape[1] > latents.shape[1] and rule == "mean" and latents.shape[2] > 1:

        def add(total: Params, member: Array) -> tuple[Params, None]:
            evidence = read(member[:, :, None])
            return {name: total[name] + combined(evidence, b) for name, b in biases.items()}, None

        biases = {"probability": bias} | ({"alone": jnp.zeros_like(bias)} if biased else {})
        empty = jnp.zeros((*bias.shape, *size), jnp.float32)
        members = jnp.moveaxis(latents, 2, 0)
        total, _ = jax.lax.scan(add, dict.fromkeys(biases, empty), members)
        return {name: value / len(members) for name, value in total.items()}

    evidence = read(latents)
    masks = {"probability": combined(evidence, bias)}
    if biased:
        masks["alone"] = combined(evidence, jnp.zeros_like(bias))
    return masks


def _placed(tree: Params, mesh: Mesh) -> Params:
    """The tree on the mesh by the rule table; arrays that lie there already are left alone."""
    shardings = infer_shardings(tree, mesh)

    def at_home(x: Any, sharding: NamedSharding) -> bool:
        return isinstance(x, jax.Array) and x.sharding.is_equivalent_to(sharding, x.ndim)

    if all(jax.tree.leaves(jax.tree.map(at_home, tree, shardings))):
        return tree
    return place(tree, shardings)
