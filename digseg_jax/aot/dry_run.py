# SPDX-License-Identifier: Apache-2.0
"""Whether a job's evaluation fits, judged before its first step: programs are traced, none is compiled.

On the devices, the largest program of one batch of views counts, with what lies there beside it. On the
host, the masks of the images that are segmented together count, as large as the split's largest image.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

from jax.sharding import Mesh

from digseg_jax.aot.programs import evaluation_bytes, placed_bytes
from digseg_jax.aot.shapes import Architecture
from digseg_jax.config.schema import EvalConfig
from digseg_jax.errors import DoesNotFit
from digseg_jax.evaluation.clip_presence import check_presence_model
from digseg_jax.evaluation.examples import EvalExamples, eval_examples, spread
from digseg_jax.io.image_file import dimensions_of
from digseg_jax.log import log
from digseg_jax.prediction.segmenter import chooses_masks, trained_short_side, view_size
from digseg_jax.runtime.collectives import processes_on_this_host
from digseg_jax.runtime.cpu import host_memory
from digseg_jax.runtime.distributed import together
from digseg_jax.runtime.sharding import data_share
from digseg_jax.segmentation.views import count_views
from digseg_jax.training.mesh_choice import least_memory
from digseg_jax.training.step import abstract_state
from digseg_jax.training.tasks.segmentation import SegmentationTask

GB = 1e9
# An estimate is up to a fifth above what a compiler allots (RECORD.md): only one that is further above
# the memory is sure, and less is a warning.
SURE, TIGHT = 1.25, 0.95
SMALL = 10  # a U-Net is not traced if so many times its activations, as in training, fit: 4 are enough
LOOKED_AT = 2000  # images of a split whose size is read


class Need(NamedTuple):
    """Bytes that are needed, what needs them, and the settings that lower them."""

    bytes: float
    what: str
    keys: str


def check_evaluation(
    task: SegmentationTask,
    mesh: Mesh,
    scored: Sequence[EvalExamples] = (),
    *,
    while_training: bool = False,
    memory: float | None = None,
    host: float | None = None,
) -> None:
    """Compares what an evaluation needs with the memory of a device and of the host.

    Every process must call it, and all raise what any of them raises.

    Args:
      scored: the splits that are segmented, from which the vocabulary and the images come; by default
        the one of the task's configuration.
      while_training: the training's state stays on the devices meanwhile, in place of weights alone.
      memory: bytes of a device; by default the least that any process finds.
      host: bytes of this process's share of the host; by default what is found.

    Raises:
      DoesNotFit: it does not fit; names the settings to lower.
      UserError: `eval.presence_model` is missing or no CLIP.
    """
    settings = task.config.eval
    if settings.presence_model:
        with together("the model of config.eval.presence_model"):
            check_presence_model(settings.presence_model)
    scored = scored or [eval_examples(task.config.data, settings.split, settings.num_images)]

    # A large vocabulary is asked for in other programs than a small one.
    counts = [len(each.asked) for each in scored]
    whole = [n for n in counts if task.codec.asks_for_all(n, settings.exhaustive_limit)]
    ways = [whole, [n for n in counts if n not in whole]]
    state = abstract_state(task.abstract, task.config.optim) if while_training else task.abstract
    beside = placed_bytes(state, mesh)
    memory = memory or least_memory(list(mesh.devices.flat))
    neighbors = processes_on_this_host()
    with together("the memory of the evaluation"):
        for way in filter(None, ways):
            if SMALL * _activations(task, max(way)) + beside > memory:
                _compare(device_need(task, mesh, max(way), beside), memory, "a device has")

        # A process segments as many images together as its devices take views.
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        views = settings.batch_size * shards // data_share(mesh)[1]
        largest = max((host_need(task, each, views) for each in scored), key=lambda need: need.bytes)
        who = "the host has" if neighbors == 1 else f"each of {neighbors} processes of the host has"
        _compare(largest, host or host_memory() / neighbors, who)


def _activations(task: SegmentationTask, classes: int) -> float:
    """Bytes of a batch of views, all masks and members at once, by the measured rule for training."""
    data, settings = task.config.data, task.config.eval
    height, width = view_size(settings, data)
    larger = height * width / data.image_size**2
    each = task.activation_bytes() / task.codec.num_images(data.num_queries) * larger
    masks = task.codec.num_images(task.codec.slots(classes))
    return settings.batch_size * masks * settings.ensemble * each


def device_need(task: SegmentationTask, mesh: Mesh, classes: int, beside: float) -> Need:
    """Bytes on a device while its largest program of an evaluation runs.

    classes: of the vocabulary. beside: as in `check_evaluation`.
    """
    # Constants of the right shapes are enough for a program that is never run.
    shapes = copy.copy(task)
    shapes.codec = copy.copy(task.codec)
    shapes.codec.assume(task.vae.config.latent_channels)

    # Mere shapes have no text tower, and whoever encodes queries as they come has no bank.
    tower = task.parts.tower
    width = tower.width if tower else task.frozen["bank"]["tokens"].shape[-1]
    architecture = Architecture(task.unet_config, task.vae.config, width)
    settings, compute = task.config.eval, task.config.compute
    peak = max(evaluation_bytes(shapes, architecture, mesh, settings.batch_size, classes))

    # With one view at a time, what is left to lower is how much of it is computed at once.
    held = placed_bytes(task.frozen["vae"], mesh) + beside
    what = (
        f"evaluating {settings.batch_size} views of {_by(view_size(settings, task.config.data))} a "
        f"device ({held / GB:.2f} GB of it weights and what stays beside them)"
    )
    keys = f"config.eval.batch_size={settings.batch_size}"
    if settings.batch_size == 1:
        keys = (
            f"config.compute.unet_batch={compute.unet_batch}, compute.vae_batch={compute.vae_batch} or "
            "eval.view_size"
        )
    return Need(peak + held, what, keys)


def host_need(task: SegmentationTask, examples: EvalExamples, views: int) -> Need:
    """Bytes of a process's memory for the masks of the images that it segments together.

    views: of a call, on all devices of the process; as many images are segmented together.
    """
    settings, data = task.config.eval, task.config.data
    size, short_side = view_size(settings, data), settings.short_side or trained_short_side(data)
    short_side = short_side if examples.short_side is None else examples.short_side
    mode = examples.inference if settings.inference == "auto" else settings.inference
    sizes = image_sizes(examples)

    # Images of one group are at most those with the most views.
    counts = sorted(((count_views(s, size, mode, short_side), s) for s in sizes), reverse=True)
    largest = counts[0][1]
    crops = sum(count for count, _ in counts[:views])
    each = 4 * size[0] * size[1] * _planes(settings, task, len(examples.asked))
    planes = 3 * 8 * max(h * w for h, w in sizes)  # of the image's size: a mask, weights, label map
    what = (
        f"evaluating {min(views, len(counts))} images of {examples.split!r} together, up to "
        f"{_by(largest)} pixels, {counts[0][0]} views each, {len(examples.asked)} classes"
    )

    # With one image at a time, what is left to lower is the scale at which it is seen.
    keys = f"config.eval.batch_size={settings.batch_size}"
    if settings.batch_size == 1:
        keys = f"config.eval.short_side, which is {short_side or min(largest)} pixels here"
    return Need(crops * each + planes, what, keys)


def _planes(settings: EvalConfig, task: SegmentationTask, classes: int) -> int:
    """Masks of the view's size that are kept for each view."""
    decoded = classes
    if task.codec.one_by_one and settings.decoder == "probe":
        decoded = 0
    elif task.codec.one_by_one and chooses_masks(settings, settings.decoder, classes):
        decoded = settings.decode_limit

    # A calibration keeps each mask with and without its bias.
    return decoded * (2 if settings.calibrate else 1)


def image_sizes(examples: EvalExamples) -> list[tuple[int, int]]:
    """Height and width of the images of a split, of at most `LOOKED_AT` evenly spread ones.

    Of files only the head is read; of shards and the like, one image stands for all.
    """
    source = examples.source.source
    if not source.image_is_file:
        height, width = examples[0]["image"].shape[:2]
        return [(height, width)]

    # A file that cannot be read has an error of its own, with its name, when its turn comes.
    rows = [examples.rows[i] for i in spread(len(examples), LOOKED_AT)]
    found = (dimensions_of(source.files(row)["image"]) for row in rows)
    return [size for size in found if size] or [(1, 1)]


def _compare(need: Need, there: float, who: str) -> None:
    """Refuses or warns of what does not fit."""
    text = f"{need.what} takes about {need.bytes / GB:.1f} GB, {who} {there / GB:.1f} GB"
    if need.bytes > SURE * there:
        raise DoesNotFit(f"{text}: lower {need.keys}")
    if need.bytes > TIGHT * there:
        log.warning("%s: if it does not fit, lower %s", text, need.keys)


def _by(size: tuple[int, int]) -> str:
    """A size for a person, width first."""
    return f"{size[1]}x{size[0]}"
