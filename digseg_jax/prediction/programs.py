# SPDX-License-Identifier: Apache-2.0
"""The two compiled programs behind every mask: sampling mask latents, and reading masks from them.

A call takes a fixed number of views (crops of one size), each with a fixed number of queries. Shapes
therefore depend on the configuration alone, and neither an image's size nor the vocabulary causes a
compilation. Views are split over the data and fsdp axes of the mesh. All processes make the same
calls; each hands over its own views and gets back the results of these views only.
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
from digseg_jax.diffusion.ddim import step_list
from digseg_jax.log import heartbeat
from digseg_jax.runtime.collectives import local_rows
from digseg_jax.runtime.distributed import barrier
from digseg_jax.runtime.sharding import BATCH, data_share, infer_shardings, on_mesh, place, place_batch
from digseg_jax.runtime.tpu import compiler_options
from digseg_jax.segmentation import ensemble
from digseg_jax.training.tasks.segmentation import SegmentationTask

COMPILE_TIMEOUT = 3600.0  # seconds that the first process to finish compiling waits for the last


class Programs:
    """A task's weights on a mesh and its programs, each compiled once per shape.

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

        # The state of a running training is on the mesh already; weights from a file are put there now.
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
        """Samples mask latents of this process's views, k mask images and e members each.

        Args:
          crops: the views.
          index: identifies each view in the draws of the initial noise.
          tokens, mask: t texts of l tokens for each view.
          root: key of the draws.
          estep: ensemble size and denoising steps.
          mean: return the mean over the members (e = 1) in place of every member.
        """
        # Everything that is compiled into the program is in its key.
        rows = {"crops": crops, "index": index, "tokens": tokens, "mask": mask}
        program = partial(sample_latents, self.task, estep=estep, mean=mean)
        key = ("sample", estep, mean)
        return self._call(key, program, (self.params, self.vae, root), rows)

    def sample_in_steps(
        self,
        crops: UInt8[np.ndarray, "n h w 3"],
        index: Int[np.ndarray, " n"],
        tokens: Float[np.ndarray, "n t l d"],
        mask: Bool[np.ndarray, "n t l"],
        root: Array,
        estep: EStep,
        seen: Callable[[int, int, np.ndarray], None],
    ) -> Float[np.ndarray, "n k e h2 w2 c"]:
        """Samples as `sample` without a mean, but one member and one step after the other.

        The program of a step serves any number of members and steps. The latents are those of `sample`
        to rounding: a compiler may fuse other operations in a program of its own.

        seen: called with member and step, from 1, and the clean latents [n, k, e, ...] of the members
          so far, as the last one's step predicts them. What it raises ends the sampling.
        """
        # The image is encoded once; all noise is drawn at once, as in `sample`.
        texts = {"tokens": tokens, "mask": mask}
        start = partial(start_sampling, self.task, ensemble=estep.ensemble)
        drawn = self._call(
            ("start", estep.ensemble), start, (self.vae, root), {"crops": crops, "index": index} | texts
        )

        members: list[np.ndarray] = []
        count = self.task.schedule.num_timesteps
        for member in range(estep.ensemble):
            x = drawn["noise"][:, :, member]
            steps = zip(*step_list(count, estep.steps, estep.spacing), strict=True)
            for number, now in enumerate(steps, start=1):
                rows = {"image": drawn["image"], "x": x} | texts
                program, which = partial(step_latents, self.task), np.int32(member)
                x, clean = self._call(("step",), program, (self.params, which, *now), rows)
                seen(member + 1, number, np.stack([*members, clean], axis=2))
            members.append(x)
        return np.stack(members, axis=2)

    def mean(self, latents: Float[np.ndarray, "n k e h w c"]) -> Float[np.ndarray, "n k 1 h w c"]:
        """The mean over the members, as `sample` computes it."""
        return self._call(("mean",), mean_latents, (), {"latents": latents})

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
        first: int = 0,
    ) -> dict[str, np.ndarray]:
        """Reads the masks of this process's views: "probability" [n, q, h, w], float32.

        Args:
          latents: of k mask images, which show the q queries (see `segmentation.codec`).
          bias: added to the logits of each query; -inf in empty places.
          scale: factor from evidence to logits.
          size: height and width of the masks, pixels.
          decoder: "vae" or "probe" (see `SegmentationTask.read`).
          rule: how the members are combined (see `ensemble.combine`).
          biased: return "alone" as well, the probabilities without the bias.
          evidence: return "evidence" [n, q, e, h, w] instead.
          first: number of the first of the members.
        """
        # Scale and bias are arguments, not constants: another calibration compiles nothing.
        program = partial(
            read_masks, self.task, size=size, decoder=decoder, rule=rule, biased=biased, raw=evidence
        )
        key = ("read", size, decoder, rule, biased, evidence)
        arguments = (self.vae, np.float32(scale), np.int32(first))
        return self._call(key, program, arguments, {"latents": latents, "bias": bias})

    def agree_on_largest(self, *mine: int) -> tuple[int, ...]:
        """The largest value of each number over all processes; every process must call it."""
        if jax.process_count() == 1:
            return mine
        from jax.experimental import multihost_utils

        # [processes, numbers]
        every = np.asarray(multihost_utils.process_allgather(np.asarray(mine, np.int32)))
        return tuple(int(n) for n in every.reshape(-1, len(mine)).max(axis=0))

    def _call(
        self, key: tuple, program: Callable, shared: tuple[Any, ...], rows: dict[str, np.ndarray]
    ) -> Any:
        """Runs a program on shared arguments and this process's rows; returns these rows' results.

        key: identifies the program together with the rows' shapes.
        """
        # Compile at the first call with these shapes.
        batch = place_batch(rows, self.mesh)
        shapes = tuple((name, x.shape, str(x.dtype)) for name, x in sorted(batch.items()))
        if (key, shapes) not in self._programs:
            self._programs[key, shapes] = self._compile(key[0], program, shared, batch)

        # Wait for the devices, so that `seconds` measures work and not its dispatch.
        start = time.monotonic()
        out = jax.block_until_ready(self._programs[key, shapes](*shared, batch))
        self.seconds += time.monotonic() - start
        return jax.tree.map(local_rows, out)

    def _compile(
        self, name: str, program: Callable, shared: tuple[Any, ...], batch: dict[str, Array]
    ) -> Callable[..., Any]:
        """Compiles a program for the mesh's platform; returns when all processes have compiled it."""
        platform = self.mesh.devices.flat[0].platform
        lowered = trace(program, shared, batch, self.mesh).lower(lowering_platforms=(platform,))
        with heartbeat(f"compiling: {name}"):
            compiled = lowered.compile(compiler_options(platform))
        self.compiled += 1

        # Compilation takes uneven times, and a collective would give up on a process that is late.
        barrier("a compiled program", COMPILE_TIMEOUT)
        return compiled


def trace(program: Callable, shared: tuple[Any, ...], batch: Params, mesh: Mesh) -> jax.stages.Traced:
    """Traces one of the programs below for these arguments (arrays or shapes)."""
    # Rows are split over the mesh and numbers are replicated; None leaves weights as they are placed.
    rows, whole = NamedSharding(mesh, BATCH), NamedSharding(mesh, P())
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
    # The texts take the place of the prompt bank: one set [t, l, d] for each view.
    frozen = {"vae": vae, "bank": {"tokens": batch["tokens"], "mask": batch["mask"]}}
    latents = task.sample(params, frozen, batch["crops"], batch["index"], estep, seed=root)
    return mean_latents({"latents": latents}) if mean else latents


def mean_latents(batch: Params) -> Float[Array, "n k 1 h w c"]:
    """The program of `Programs.mean`."""
    return batch["latents"].mean(axis=2, keepdims=True)


def start_sampling(
    task: SegmentationTask, vae: Params, root: Array, batch: Params, *, ensemble: int
) -> dict[str, Array]:
    """Latents of the images and noise of the members, where `Programs.sample_in_steps` begins."""
    frozen = {"vae": vae, "bank": {"tokens": batch["tokens"], "mask": batch["mask"]}}
    image, noise = task.start(frozen, batch["crops"], batch["index"], ensemble, seed=root)
    return {"image": image, "noise": noise}


def step_latents(
    task: SegmentationTask,
    params: Params,
    member: Array,
    t: Array,
    t_next: Array,
    is_last: Array,
    batch: Params,
) -> tuple[Array, Array]:
    """One step of one member: the next latents and the clean ones so far, [n, k, h, w, c] each."""
    bank = {"tokens": batch["tokens"], "mask": batch["mask"]}
    return task.step(params, bank, batch["image"], batch["x"], (t, t_next, is_last), member)


def read_masks(
    task: SegmentationTask,
    vae: Params,
    scale: Array,
    first: Array,
    batch: Params,
    *,
    size: tuple[int, int],
    decoder: str,
    rule: str,
    biased: bool,
    raw: bool,
) -> dict[str, Array]:
    """The program of `Programs.read`."""
    latents, bias = batch["latents"], batch["bias"]  # [n, k, e, h, w, c], [n, q]
    read = partial(task.read, {"vae": vae}, size=size, decoder=decoder)
    if raw:
        return {"evidence": read(latents, first=first)}

    def combined(evidence: Array, bias: Array) -> Array:
        """Probabilities [n, q, h, w] from the evidence of the members [n, q, e, h, w]."""
        kind = {"exclusive": task.codec.exclusive, "background": task.codec.background}
        return ensemble.probabilities(evidence, scale, bias, **kind, rule=rule)

    # A mask image that shows many queries: add up one member at a time if the rule is the mean, as the
    # evidence of all members together would take e times the memory.
    if bias.shape[1] > latents.shape[1] and rule == "mean" and latents.shape[2] > 1:

        def add(total: Params, member: tuple[Array, Array]) -> tuple[Params, None]:
            """Adds the probabilities of one member, with the bias and, if wanted, without."""
            number, own = member
            evidence = read(own[:, :, None], first=number)
            return {name: total[name] + combined(evidence, b) for name, b in biases.items()}, None

        # `scan` runs over the leading axis, so the members go there.
        biases = {"probability": bias} | ({"alone": _without(bias)} if biased else {})
        empty = jnp.zeros((*bias.shape, *size), jnp.float32)
        members = jnp.moveaxis(latents, 2, 0)
        numbers = first + jnp.arange(len(members))
        total, _ = jax.lax.scan(add, dict.fromkeys(biases, empty), (numbers, members))
        return {name: value / len(members) for name, value in total.items()}

    # Otherwise read all members at once.
    evidence = read(latents, first=first)
    masks = {"probability": combined(evidence, bias)}
    if biased:
        masks["alone"] = combined(evidence, _without(bias))
    return masks


def _without(bias: Array) -> Array:
    """Biases of zero; empty places stay empty."""
    return jnp.where(jnp.isneginf(bias), bias, 0.0)


def _placed(tree: Params, mesh: Mesh) -> Params:
    """The tree on the mesh by the rule table; a tree that is placed so already is returned as it is."""
    shardings = infer_shardings(tree, mesh)

    def at_home(x: Any, sharding: NamedSharding) -> bool:
        """Whether an array already has the sharding that the rules give it."""
        return isinstance(x, jax.Array) and x.sharding.is_equivalent_to(sharding, x.ndim)

    # No copy of weights that are in place: the devices might not hold them twice.
    if all(jax.tree.leaves(jax.tree.map(at_home, tree, shardings))):
        return tree
    return place(tree, shardings)
