# SPDX-License-Identifier: Apache-2.0
"""A run's programs, lowered from shapes alone: the train step, the U-Net's share, an evaluation."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from digseg_jax import trees
from digseg_jax.aot import shapes
from digseg_jax.aot.liveness import peak_bytes
from digseg_jax.aot.shapes import Architecture, UNetTask, abstract_parts
from digseg_jax.arraytypes import Batch, Shapes
from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import Config, MeshConfig, OptimConfig
from digseg_jax.data.vocabulary import num_classes
from digseg_jax.log import log
from digseg_jax.prediction import programs as prediction
from digseg_jax.prediction.segmenter import chooses_masks, view_size
from digseg_jax.runtime.sharding import check_batch, infer_shardings, make_mesh, nearest_batches
from digseg_jax.training.step import abstract_state, make_train_step
from digseg_jax.training.tasks.base import example_keys
from digseg_jax.training.tasks.segmentation import SegmentationTask

# program -> name of its result's files, without ending
FILES = {"train": "compile", "unet": "compile", "eval": "compile_eval"}


@dataclasses.dataclass(frozen=True)
class Program:
    """A program ready to be compiled.

    Attributes:
        name: train or unet; in an evaluation coarse, sample or read.
        lowered: for the devices of a mesh.
        images: images of one call on all devices; views for an evaluation.
        queries: masks of one call, on all devices.
        calls: how often it is called for each batch of images.
        waiting: bytes on a device of what lies there without being an argument: the next step's batch,
            or, while an evaluation decodes, the U-Net.
    """

    name: str
    lowered: jax.stages.Lowered
    images: int
    queries: int
    calls: int = 1
    waiting: float = 0.0


class Traced(NamedTuple):
    """A program of an evaluation, traced for a mesh; the fields are those of `Program`."""

    name: str
    traced: jax.stages.Traced
    images: int
    queries: int
    calls: int
    waiting: float


def abstract_task(config: Config, architecture: Architecture) -> SegmentationTask | UNetTask:
    """The task that `config.compile` asks for, of mere shapes."""
    options = config.compile
    alone = options.program == "train" and options.unet_only
    sections = config.data, config.model, config.compute, config.loss
    parts = abstract_parts(*sections, architecture, prompts=1 if alone else None)
    task = SegmentationTask(config, parts)
    return UNetTask(task) if alone else task


def train_batch(task: SegmentationTask | UNetTask, architecture: Architecture, images: int) -> Shapes:
    """Shapes of a batch for the task's train step."""
    data, model = task.config.data, task.config.model
    if isinstance(task, UNetTask):
        return shapes.unet_batch(data, model, architecture, images)
    return shapes.train_batch(data, task.codec, architecture, images)


def lower(
    task: SegmentationTask | UNetTask,
    architecture: Architecture,
    mesh: Mesh,
    platform: str | None = None,
) -> list[Program]:
    """Lowers what the task's `config.compile` asks for: the train step, or an evaluation's programs.

    Args:
      task: from `abstract_task`.
      platform: lower for this one instead of the platform of the mesh's devices.

    Raises:
      UserError: a batch that the devices do not divide.
    """
    config, options = task.config, task.config.compile
    if options.program == "eval" and isinstance(task, SegmentationTask):
        views = options.per_device_batch or config.eval.batch_size
        return evaluation_programs(task, architecture, mesh, views, options.eval_queries, platform)

    accumulation = config.compute.accumulation or 1
    images = train_images(config.train.batch_size, options.per_device_batch, accumulation, mesh)
    batch = train_batch(task, architecture, images)
    lowered = lower_step(
        task, batch, mesh, config.optim, platform,
        steps=config.train.steps, seed=config.seed, accumulation=accumulation,
    )  # fmt: skip
    name, queries = "train", images * config.data.num_queries
    if isinstance(task, UNetTask):
        name, queries = "unet", images

    # While a step runs, the next batch is already on its way to the devices.
    rows = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in batch.values())
    return [Program(name, lowered, images, queries, waiting=rows / shards(mesh))]


def shards(mesh: Mesh) -> int:
    """Number of parts that a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def train_images(batch_size: int, per_device: int, accumulation: int, mesh: Mesh) -> int:
    """Images of a train step, on all devices.

    A `config.train.batch_size` that they do not divide, which a run rejects, becomes the next larger
    one that they do: the question here is what fits on these devices, and a batch belongs to a recipe.

    Raises:
      UserError: `config.compile.per_device_batch` does not divide.
    """
    parts = shards(mesh) * accumulation

    # A batch given per device goes before the recipe's.
    if per_device:
        key = f"config.compile.per_device_batch={per_device} makes a batch"
        check_batch(key, per_device * shards(mesh), mesh, accumulation)
        return per_device * shards(mesh)

    images = nearest_batches(batch_size, parts)[-1]
    if batch_size % parts == 0:
        return batch_size
    log.warning(
        "config.train.batch_size=%d is no multiple of %d devices%s: compiling for %d, as a run would "
        "need",
        batch_size, shards(mesh), f" in {accumulation} parts" if accumulation > 1 else "", images,
    )  # fmt: skip
    return images


def lower_step(
    task: SegmentationTask | UNetTask,
    batch: Shapes,
    mesh: Mesh,
    optim: OptimConfig,
    platform: str | None = None,
    **options: int,
) -> jax.stages.Lowered:
    """Lowers the very step that `Trainer` runs; options: those of `make_train_step`."""
    state = abstract_state(task.abstract, optim)
    state_shardings, frozen_shardings = infer_shardings((state, task.frozen), mesh)
    step = make_train_step(task, mesh, state_shardings, frozen_shardings, optim, **options)

    platforms = _platforms(mesh, platform)
    return step.trace(state, task.frozen, batch).lower(lowering_platforms=platforms)


def _platforms(mesh: Mesh, platform: str | None) -> tuple[str, ...]:
    """The platform to lower for: the mesh's own by default."""
    return (platform or mesh.devices.flat[0].platform,)


def evaluation_programs(
    task: SegmentationTask,
    architecture: Architecture,
    mesh: Mesh,
    views: int,
    classes: int = 0,
    platform: str | None = None,
) -> list[Program]:
    """The programs of `trace_evaluation`, lowered; platform: as in `lower`."""
    platforms = _platforms(mesh, platform)
    return [
        Program(
            name=each.name,
            lowered=each.traced.lower(lowering_platforms=platforms),
            images=each.images,
            queries=each.queries,
            calls=each.calls,
            waiting=each.waiting,
        )
        for each in trace_evaluation(task, architecture, mesh, views, classes)
    ]


def trace_evaluation(
    task: SegmentationTask, architecture: Architecture, mesh: Mesh, views: int, classes: int = 0
) -> list[Traced]:
    """Programs that `prediction.Segmenter` runs to ask a view for a whole vocabulary.

    All classes are asked for, or, beyond `eval.exhaustive_limit`, those that a coarse pass finds.

    Args:
      task: of mere shapes.
      views: of a call on each device.
      classes: of the vocabulary; 0: those of the task's data.
    """
    # Sizes as the segmenter chooses them.
    settings, codec = task.config.eval, task.codec
    views *= shards(mesh)
    classes = classes or num_classes(task.config.data)
    size = view_size(settings, task.config.data)

    # Shapes of the arguments, with their places on the mesh.
    params = _placed(task.abstract, infer_shardings(task.abstract, mesh))
    vae = _placed(task.frozen["vae"], infer_shardings(task.frozen["vae"], mesh))
    estep = EStep(settings.ensemble, settings.steps, settings.spacing)
    mean = settings.decoder == "latent_mean" and not codec.recolored

    def made(
        name: str, program: Any, shared: tuple[Any, ...], batch: Shapes, queries: int, slots: int
    ) -> Traced:
        """A program traced; `slots` queries per call of the `queries` that are asked."""
        traced = prediction.trace(program, shared, batch, mesh)
        masks = views * codec.num_images(slots)
        idle = 0.0 if any(x is params for x in shared) else _stored_bytes(params)
        return Traced(name, traced, views, masks, -(-queries // slots), idle)

    def sample(name: str, estep: EStep, queries: int, slots: int, mean: bool) -> Traced:
        """The program that samples mask latents: [views, slots, members or 1, h, w, c]."""
        program = partial(prediction.sample_latents, task, estep=estep, mean=mean)
        root = jax.eval_shape(lambda: jax.random.key(0))
        texts = len(codec.texts(("",) * slots))
        batch = shapes.view_batch(task.config.model, architecture, views, size, texts)
        return made(name, program, (params, vae, root), batch, queries, slots)

    def read(name: str, queries: int, slots: int) -> Traced:
        """The program that turns mask latents into masks."""
        program = partial(
            prediction.read_masks,
            task,
            size=size,
            decoder="probe" if settings.decoder == "probe" else "vae",
            rule=settings.ensemble_rule,
            biased=settings.calibrate,
            raw=False,
        )

        # With "latent_mean" the members were averaged by the sampling program.
        members = 1 if mean else settings.ensemble
        images = codec.num_images(slots)
        batch = shapes.latent_batch(architecture, views, size, images, members, slots)
        numbers = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
        return made(name, program, (vae, *numbers), batch, queries, slots)

    # A large vocabulary: one step for every class, unless a CLIP looks at the image instead; then all
    # steps for those that pass the gate.
    if not codec.asks_for_all(classes, settings.exhaustive_limit):
        asked = codec.gate_limit(settings.gate_limit)
        slots = codec.slots(asked)
        found = [sample("sample", estep, asked, slots, mean)]
        if not settings.presence_model:
            found.insert(0, sample("coarse", EStep(1, 1), classes, codec.slots(classes), False))
    else:
        slots, asked = codec.slots(classes), classes
        found = [sample("sample", estep, asked, slots, mean)]

    # A codec that paints queries together has nothing to read or choose one by one.
    if not codec.one_by_one:
        return [*found, read("read", asked, slots)]

    # The linear latent decoder reads latents on the host, so it needs no program. With
    # `decode_limit`, only the masks that it ranks first in a view are decoded.
    if settings.decoder == "probe":
        return found
    filled = -(-asked // slots) * slots
    if chooses_masks(settings, settings.decoder, filled):
        return [*found, read("read", settings.decode_limit, settings.decode_limit)]
    return [*found, read("read", asked, slots)]


def _placed(tree: Any, shardings: Any) -> Any:
    """A tree of shapes with the sharding of each array."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def kept_bytes(task: SegmentationTask | UNetTask, architecture: Architecture) -> float:
    """Bytes per image that the forward pass keeps for the backward pass, as the program is written.

    Traced, not compiled: the growth from one image to two. XLA may keep less, or other dtypes.
    """

    def residuals(images: int) -> int:
        """Bytes of everything that the backward pass closes over."""
        batch = train_batch(task, architecture, images)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), images))

        def pullback(params: Any, frozen: Any, batch: Any, keys: Any) -> Any:
            """The backward pass as a function: its leaves are the kept arrays."""
            return jax.vjp(lambda p: task.loss(p, frozen, batch, keys)[0], params)[1]

        kept = jax.eval_shape(pullback, task.abstract, task.frozen, batch, keys)
        return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(kept))

    # The difference drops what does not grow with the batch, such as the parameters.
    return residuals(2) - residuals(1)


def temporary_bytes(
    task: SegmentationTask | UNetTask, architecture: Architecture, mesh: Mesh
) -> list[float]:
    """Bytes of results on one device for each of `lower`'s programs, by `aot.liveness`.

    Split kernels are added as if all were gathered at once: fetched ahead, many of
    them are there together.
    """
    config, options = task.config, task.config.compile
    accumulation = config.compute.accumulation or 1
    if options.program == "eval" and isinstance(task, SegmentationTask):
        views = options.per_device_batch or config.eval.batch_size
        needed = evaluation_bytes(task, architecture, mesh, views, options.eval_queries)
    else:
        # One device's images, a microbatch of them at a time.
        images = train_images(config.train.batch_size, options.per_device_batch, accumulation, mesh)
        local = images // shards(mesh) // accumulation
        batch = train_batch(task, architecture, local)
        needed = [_gradient_bytes(task, batch, accumulation, mesh)]

    # With FSDP, layers gather their kernels in the model's dtype.
    gathered = 0.0
    if mesh.shape["fsdp"] > 1:
        width = jnp.dtype(config.model.dtype).itemsize
        gathered = float(width * count(task.abstract))
    return [each + gathered for each in needed]


def evaluation_bytes(
    task: SegmentationTask, architecture: Architecture, mesh: Mesh, views: int, classes: int = 0
) -> list[float]:
    """Bytes of results on one device for each program of `trace_evaluation`, by `aot.liveness`."""
    # Traced for one device with its share of the views; their results are not counted.
    alone = make_mesh(MeshConfig(1, 1, 1), [mesh.devices.flat[0]])
    made = trace_evaluation(task, architecture, alone, views, classes)
    return [peak_bytes(each.traced.jaxpr.jaxpr, output_share=0.0) for each in made]


def _gradient_bytes(
    task: SegmentationTask | UNetTask, batch: Shapes, accumulation: int, mesh: Mesh
) -> float:
    """Temporaries of loss and gradients for a microbatch of one device.

    The optimizer's update is fused and takes nothing.
    """

    def loss(params: Any, frozen: Any, batch: Batch) -> Any:
        return task.loss(params, frozen, batch, example_keys(0, batch["index"]))

    # Gradients are the returned results; a device stores its share of them.
    gradient = jax.value_and_grad(loss, has_aux=True)
    traced = jax.make_jaxpr(gradient)(task.abstract, task.frozen, batch)
    share = _stored_share(task.abstract, mesh)
    needed = peak_bytes(traced.jaxpr, output_share=share)
    if accumulation > 1:
        needed += 4 * count(task.abstract) * share  # float32 sum of the microbatches' gradients
    return needed


def placed_bytes(tree: Any, mesh: Mesh) -> float:
    """Bytes of a tree of arrays, or of their shapes, on one device of the mesh."""
    return _stored_bytes(_placed(tree, infer_shardings(tree, mesh)))


def _stored_bytes(placed: Any) -> float:
    """Bytes of a tree from `_placed` on one device."""
    leaves = jax.tree.leaves(placed)
    return float(sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves))


def _stored_share(tree: Any, mesh: Mesh) -> float:
    """Part of a tree's numbers that one device of the mesh stores, 0..1."""
    places = jax.tree.leaves(infer_shardings(tree, mesh))
    pairs = zip(jax.tree.leaves(tree), places, strict=True)
    return float(sum(np.prod(s.shard_shape(x.shape)) for x, s in pairs) / count(tree))


def count(params: Any) -> int:
    """Number of parameters."""
    return sum(int(np.prod(x.shape)) for x in trees.flatten(params).values())
