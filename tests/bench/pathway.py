# SPDX-License-Identifier: Apache-2.0
"""How text enters: adapters before the only cross-attention, or a parallel pathway, on the land cover.

Two text encoders: the one that the prior was trained with, whose adapters come with it; and another,
whose tokens are wider and in another space, so that adapters begin as random projections. The other one
is the same encoder behind a fixed random rotation into 512 dimensions (CLIP ViT-B/16's): it knows the
same about words, and every difference between the two is the pathway's.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from digseg_jax import assets
from digseg_jax.config.parse import parse
from digseg_jax.config.schema import Config
from digseg_jax.data.datasets.landcover import TILE
from digseg_jax.evaluation.evaluator import Evaluator
from digseg_jax.evaluation.examples import eval_examples
from digseg_jax.log import log
from digseg_jax.metrics import confusion
from digseg_jax.models import functional
from digseg_jax.models.text.output import TextOutput
from digseg_jax.prediction.segmenter import Segmenter
from digseg_jax.recipes import land_cover
from digseg_jax.runtime.sharding import make_mesh
from digseg_jax.training.loop import Trainer
from digseg_jax.training.setup import Setup
from digseg_jax.training.step import averaged
from digseg_jax.training.tasks.parts import (
    Parts,
    adapt_unet,
    bank_arrays,
    choose_kernels,
    encode_bank,
    load_parts,
    new_parameters,
)
from digseg_jax.training.tasks.segmentation import SegmentationTask
from digseg_jax.weights import TextTower, load_config, minilm_folder
from tests.bench.prior import ESTEP
from tests.bench.spread import deviation

WIDTH = 512  # of the other encoder's tokens


class Rotated(nnx.Module):
    """A text encoder with its tokens multiplied by a matrix."""

    def __init__(self, model: Any, matrix: np.ndarray):
        self.model, self.matrix = model, nnx.Param(jnp.asarray(matrix))

    def __call__(self, ids: jax.Array, mask: jax.Array) -> TextOutput:
        out = self.model(ids, mask)
        return out._replace(last_hidden_state=out.last_hidden_state @ self.matrix[...])


def rotated(tower: TextTower) -> TextTower:
    """The encoder behind a fixed random rotation into `WIDTH` dimensions."""
    square = np.random.default_rng(0).standard_normal((WIDTH, WIDTH))
    matrix = np.linalg.qr(square)[0][: tower.width].astype(np.float32)
    graphdef, params = functional.split(Rotated(functional.merge(tower.graphdef, tower.params), matrix))
    return dataclasses.replace(tower, graphdef=graphdef, params=params, width=WIDTH)


def with_tower(parts: Parts, config: Config, tower: TextTower) -> Parts:
    """The parts with another text encoder."""
    stored = load_config(assets.resolve(config.model.unet))
    unet = adapt_unet(stored, parts.vae, config.model, tower.width)
    bank = bank_arrays(encode_bank(tower, parts.prompts, config.model))
    frozen = parts.frozen | {"bank": bank}
    new = new_parameters(config.model, stored, unet)
    return dataclasses.replace(parts, tower=tower, unet=unet, frozen=frozen, new=new)


def configuration(seed: int, steps: int, injection: str, scale: float) -> Config:
    """The quickstart's fine-tuning of the prior with one pathway."""
    base = parse(land_cover())

    # By its folder, so that the prior's own encoder is loaded apart from that of the queries.
    own = "minilm" if injection == "parallel" else ""
    model = dataclasses.replace(
        base.model, text=str(minilm_folder()), text_injection=injection, unet_text=own
    )
    config = dataclasses.replace(
        base,
        seed=seed,
        data=dataclasses.replace(base.data, text_noise=0.2),
        model=model,
        optim=dataclasses.replace(base.optim, ema_decay=0.99, new_lr_scale=scale),
        train=dataclasses.replace(base.train, steps=steps),
        eval=dataclasses.replace(base.eval, view_size=(TILE,)),
    )
    kernels = choose_kernels(config.compute, jax.devices(), config.model.dtype, config.mesh.tensor)
    return dataclasses.replace(config, compute=kernels)


def one(config: Config, encoder: str) -> dict[str, float]:
    """Trains in a scratch directory; mIoU on test at 1x1 without calibration."""
    parts = load_parts(config.data, config.model, config.compute, config.loss)
    mesh = make_mesh(config.mesh)
    if encoder == "other":
        assert parts.tower is not None
        parts = with_tower(parts, config, rotated(parts.tower))
    task = SegmentationTask(config, parts)
    with tempfile.TemporaryDirectory() as scratch:
        state = Trainer(Setup(config, task, mesh), scratch).run()

    segmenter = Segmenter(task, averaged(state), mesh=mesh)
    examples = eval_examples(config.data, "test", config.eval.num_images)
    scores = Evaluator(segmenter, examples, config.eval, seed=config.seed).scores(ESTEP)
    return {"miou": scores.miou, "accuracy": confusion.pixel_accuracy(scores.confusion)}


def run(seeds: int, steps: int, scales: tuple[float, ...]) -> dict[str, Any]:
    """Every pathway with both encoders; within a seed only these differ.

    scales: values of optim.new_lr_scale. The adapters of the prior's own encoder are not new, so that
    they have one row.
    """
    arms = [
        (encoder, injection, scale)
        for encoder in ("own", "other")
        for injection in ("adapter", "parallel")
        for scale in scales
        if (encoder, injection) != ("own", "adapter") or scale == scales[0]
    ]
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        for encoder, injection, scale in arms:
            name = f"{encoder} encoder, {injection}, new_lr_scale {scale:g}"
            found = one(configuration(seed, steps, injection, scale), encoder)
            runs.setdefault(name, []).append(found)
            log.info("seed %d, %s: %s", seed, name, found)
    result = {"steps": steps, "seeds": seeds, "estep": str(ESTEP), "runs": runs}
    return result | as_table(result)


def as_table(result: dict[str, Any]) -> dict[str, Any]:
    """What a report shows of it, if the file lies in RUN/bench (`report.sections.bench_tables`)."""
    rows = []
    for name, found in result["runs"].items():
        values = [[one[kind] for one in found] for kind in ("miou", "accuracy")]
        figures = [function(x) for x in values for function in (statistics.fmean, deviation)]
        rows.append([name, *figures])
    return {
        "title": f"How text enters: {result['steps']} steps, {result['seeds']} seeds, "
        f"{result['estep']}, uncalibrated",
        "columns": ["encoder and pathway", "mIoU", "±", "accuracy", "±"],
        "rows": rows,
    }
