# SPDX-License-Identifier: Apache-2.0
"""The prompted codec against the binary one on the land cover, at equal training compute.

Each is trained on 8 classes and, apart, on 17. The binary codec takes the given number of steps; the
other takes as many as have the same FLOPs. Scores are of 1x1, uncalibrated, with every decoder: a codec
is judged by its best one. Told as well: the time of an image, scores with the colors permuted, and, for
the 8 classes, with names that were never trained. `compare` does the same with weights that are there.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from digseg_jax.aot.programs import abstract_task, train_batch
from digseg_jax.aot.shapes import Architecture
from digseg_jax.arraytypes import Params
from digseg_jax.config.parse import parse, with_settings
from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import Config
from digseg_jax.data.datasets.landcover import TILE
from digseg_jax.data.datasets.landcover_prompts import HELD_OUT
from digseg_jax.data.vocabulary import num_classes
from digseg_jax.evaluation.evaluator import Evaluator
from digseg_jax.evaluation.examples import eval_examples
from digseg_jax.log import log
from digseg_jax.metrics import confusion
from digseg_jax.prediction.description import find_export, read_description
from digseg_jax.prediction.pretrained import load_segmenter
from digseg_jax.prediction.segmenter import Segmenter
from digseg_jax.recipes import land_cover
from digseg_jax.runtime.sharding import make_mesh
from digseg_jax.segmentation.prompted import PromptedCodec
from digseg_jax.training.flops import step_flops
from digseg_jax.training.loop import Trainer
from digseg_jax.training.setup import Setup
from digseg_jax.training.step import averaged
from digseg_jax.training.tasks.parts import choose_kernels
from digseg_jax.training.tasks.segmentation import SegmentationTask
from tests.bench.prior import ESTEP
from tests.bench.spread import deviation

DATA = ("landcover", "landcover_igbp")
DECODERS = ("vae", "probe")
ENSEMBLES = (EStep(8, 1), EStep(8, 2))
UNSEEN = {group: name for name, group in HELD_OUT.items()}  # class -> a name that was never trained


def configuration(data: str, codec: str, seed: int, steps: int, images: int) -> Config:
    """A short fine-tuning of the prior with one codec; its own settings are those of its recipe."""
    values = land_cover()
    values.data.name, values.model.codec, values.seed = data, codec, seed
    values.train.steps, values.optim.ema_decay = steps, 0.99
    values.data.text_noise, values.loss.mask_weight = 0.2, 0.3
    values.diffusion.terminal_fraction = 0.7
    values.eval.view_size, values.eval.num_images = (TILE,), images

    if codec == "binary":
        values.data.negative_rate, values.data.word_dropout = 0.25, 0.5
    else:
        values.data.num_queries = num_classes(parse(values).data)
        values.data.negative_rate, values.data.name_dropout = 0.5, 1.0
    config = parse(values)
    kernels = choose_kernels(config.compute, jax.devices(), config.model.dtype, config.mesh.tensor)
    return dataclasses.replace(config, compute=kernels)


def train(config: Config, task: SegmentationTask) -> Params:
    """The averaged weights of a run in a scratch directory."""
    with tempfile.TemporaryDirectory() as scratch:
        return averaged(Trainer(Setup(config, task, make_mesh(config.mesh)), scratch).run())


def permuted(task: SegmentationTask, seed: int) -> SegmentationTask:
    """The task with the colors of its names in another order; the background keeps its own."""
    state, codec = dict(task.codec.state()), copy.copy(task.codec)
    names = len(state["colors"]) - 1
    order = [*np.random.default_rng(seed).permutation(names).tolist(), names]
    codec.restore(
        state | {key: [state[key][i] for i in order] for key in ("colors", "prototypes", "latents")}
    )
    other = copy.copy(task)
    other.codec = codec
    return other


def scores(
    config: Config,
    task: SegmentationTask,
    params: Params,
    decoder: str,
    prompts: Sequence[str] = (),
    estep: EStep = ESTEP,
) -> dict[str, Any]:
    """mIoU, accuracy and IoU by class on test, and the seconds of an image."""
    settings = dataclasses.replace(config.eval, decoder=decoder)
    segmenter = Segmenter(task, params, settings, mesh=make_mesh(config.mesh))
    examples = eval_examples(config.data, "test", settings.num_images)
    every = Evaluator(segmenter, examples, settings, seed=config.seed, prompts=prompts)
    found = every.scores(estep, protocol="exhaustive")
    return {
        "miou": found.miou,
        "accuracy": confusion.pixel_accuracy(found.confusion),
        "seconds": segmenter.seconds / len(examples),
        "per_class": found.per_class(),
    }


def one(data: str, codec: str, seed: int, steps: int, images: int) -> dict[str, dict[str, Any]]:
    """Trains one codec and scores it: with each decoder, and what else can be asked of it."""
    config = configuration(data, codec, seed, steps, images)
    task = SegmentationTask(config)
    params = train(config, task)

    found = {decoder: scores(config, task, params, decoder) for decoder in DECODERS}
    best = max(DECODERS, key=lambda decoder: found[decoder]["miou"])
    if isinstance(task.codec, PromptedCodec):
        found["permuted"] = scores(config, permuted(task, seed), params, best)
    if data == "landcover":
        names = eval_examples(config.data, "test", 1).classes
        unseen = [UNSEEN.get(name, name) for name in names]
        found["unseen names"] = scores(config, task, params, best, unseen)
    return found


def compare(weights: str, binary: str, data: str, images: int) -> dict[str, Any]:
    """Scores of trained weights of both codecs on one class list, 1x1, uncalibrated.

    weights, binary: exports of the prompted and of the binary codec. images: of test, 0 for all.

    Returns:
      Each codec's scores by decoder, and of its best decoder with 8 members; of the prompted codec also
      with the colors permuted, and for the 8 classes with names that were never trained.
    """
    result: dict[str, Any] = {"data": data, "estep": str(ESTEP)}
    for codec, where in (("prompted", weights), ("binary", binary)):
        folder = find_export(where)
        trained = read_description(folder).training_config(folder)
        settings = {"data.name": data, "eval.view_size": (TILE,), "eval.num_images": images}
        config = with_settings(trained, settings)
        loaded = load_segmenter(folder, config)
        config, task, params = loaded.task.config, loaded.task, loaded.programs.params
        found = {decoder: scores(config, task, params, decoder) for decoder in DECODERS}
        best = max(DECODERS, key=lambda decoder: found[decoder]["miou"])
        if codec == "prompted":
            found["permuted"] = scores(config, permuted(task, 0), params, best)
        if data == "landcover":
            names = eval_examples(config.data, "test", 1).classes
            unseen = [UNSEEN.get(name, name) for name in names]
            found["unseen names"] = scores(config, task, params, best, unseen)
        for estep in ENSEMBLES:
            found[str(estep)] = scores(config, task, params, best, estep=estep)
        result[codec] = found | {"best": best}
        log.info("%s: %s", codec, found)
    return result | ratios(result)


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """Of the best decoders: mIoU and time against the binary codec's, and what unseen names keep."""
    ours, other = (result[codec][result[codec]["best"]] for codec in ("prompted", "binary"))
    found = {"miou": ours["miou"] / other["miou"], "seconds": ours["seconds"] / other["seconds"]}
    for estep in map(str, ENSEMBLES):
        found[f"miou, {estep}"] = result["prompted"][estep]["miou"] / result["binary"][estep]["miou"]
    unseen = result["prompted"].get("unseen names")
    if unseen:
        pairs = [(unseen["per_class"][name], ours["per_class"][name]) for name in UNSEEN]
        kept, known = (np.nansum([x or 0.0 for x in side]) for side in zip(*pairs, strict=True))
        found["kept by unseen names"] = float(kept / known)
    return {f"ratio of {name}": value for name, value in found.items()}


def equal_steps(data: str, steps: int) -> int:
    """Steps of the prompted codec with the FLOPs of so many of the binary one."""
    costs = []
    for codec in ("binary", "prompted"):
        config = configuration(data, codec, 0, steps, 1)
        parts = Architecture.of(config.model)
        task = abstract_task(config, parts)
        costs.append(step_flops(task, train_batch(task, parts, config.train.batch_size)))
    return max(1, round(steps * costs[0] / costs[1]))


def run(seeds: int, steps: int, images: int) -> dict[str, Any]:
    """Both codecs on both class lists; within a seed only these differ. images: of test, 0 for all."""
    runs: dict[str, list[dict[str, dict[str, Any]]]] = {}
    taken = {}
    for data in DATA:
        taken[data] = {"binary": steps, "prompted": equal_steps(data, steps)}
        for seed in range(seeds):
            for codec, count in taken[data].items():
                found = one(data, codec, seed, count, images)
                runs.setdefault(f"{data}, {codec}", []).append(found)
                log.info("seed %d, %s, %s: %s", seed, data, codec, found)
    result = {"steps": taken, "seeds": seeds, "estep": str(ESTEP), "runs": runs}
    return result | as_table(result)


def as_table(result: dict[str, Any]) -> dict[str, Any]:
    """What a report shows of it, if the file lies in RUN/bench (`report.sections.bench_tables`)."""
    rows = []
    for name, found in result["runs"].items():
        data, codec = name.split(", ")
        for kind in found[0]:
            values = [[one[kind][key] for one in found] for key in ("miou", "accuracy", "seconds")]
            figures = [float(np.mean(values[0])), deviation(values[0])]
            figures += [float(np.mean(x)) for x in values[1:]]
            rows.append([name, result["steps"][data][codec], kind, *figures])
    return {
        "title": f"Prompted against binary at equal training compute: {result['seeds']} seeds, "
        f"{result['estep']}, uncalibrated",
        "columns": ["classes and codec", "steps", "read", "mIoU", "±", "accuracy", "seconds"],
        "rows": rows,
    }
