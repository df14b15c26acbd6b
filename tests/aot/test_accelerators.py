# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion's programs at full size, lowered for GPUs and TPUs with what `auto` chooses there.

Only shapes: nothing is downloaded, drawn or compiled, and no accelerator is needed.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any

import jax
import pytest
import tiny

from digseg_jax.aot import programs
from digseg_jax.aot.cuda import assumed_cudnn
from digseg_jax.aot.shapes import Architecture
from digseg_jax.config.parse import parse
from digseg_jax.config.schema import Config, MeshConfig
from digseg_jax.recipes import stable_diffusion
from digseg_jax.runtime.sharding import make_mesh, on_mesh

DEVICES = {
    "cuda": types.SimpleNamespace(platform="cuda", compute_capability="9.0"),
    "tpu": types.SimpleNamespace(platform="tpu"),
}
CHOSEN = {"cuda": "cudnn", "tpu": "splash"}
CALLS = {"cuda": "@__cudnn$fmhaSoftmax", "tpu": "@tpu_custom_call"}  # of the kernels of `auto`
CLASSES = 150


def lowered_once(cases: dict[tuple[str, ...], str]) -> list[Any]:
    """Cases for both platforms; on the one that is not theirs they are slow tests.

    cases: a case -> the platform that it is always lowered for.
    """
    found = []
    for case, own in cases.items():
        for platform in CALLS:
            marks = () if platform == own else pytest.mark.slow
            found.append(pytest.param(*case, platform, marks=marks))
    return found


def configured(version: str, platform: str, codec: str = "binary") -> Config:
    """A public recipe as that platform computes it."""
    recipe = stable_diffusion(version, "ade20k")
    recipe.model.codec = codec
    recipe.mesh.data, recipe.mesh.fsdp = 2, 4
    config = tiny.for_devices(parse(recipe), [DEVICES[platform]])
    assert config.compute.attention == CHOSEN[platform]
    return config


def lowered(function: Any, platform: str, *arguments: Any) -> str:
    """The program of a function of shapes, on a mesh of eight."""
    with assumed_cudnn():
        step = jax.jit(on_mesh(make_mesh(MeshConfig(2, 4, 1)), function))
        return step.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


# sd21_clip: the parallel text pathway. biomedclip: texts whose padding is masked.
@pytest.mark.parametrize(
    ("version", "platform"),
    lowered_once({("sd15",): "tpu", ("sd21",): "cuda", ("sd21_clip",): "tpu", ("biomedclip",): "cuda"}),
)
def test_the_train_step(version, platform):
    config = configured(version, platform)
    parts, mesh = Architecture.of(config.model), make_mesh(config.mesh)
    task = programs.abstract_task(config, parts)
    batch = programs.train_batch(task, parts, config.train.batch_size)
    with assumed_cudnn():
        options = {"steps": config.train.steps, "seed": 0, "accumulation": config.compute.accumulation}
        step = programs.lower_step(task, batch, mesh, config.optim, platform, **options)
    assert CALLS[platform] in step.as_text()


@pytest.mark.parametrize(
    ("version", "codec", "platform"),
    lowered_once(
        {
            ("sd15", "palette"): "cuda",
            ("sd21", "palette"): "tpu",
            ("sd15", "prompted"): "tpu",
            ("sd15", "cached"): "cuda",
        }
    ),
)
def test_other_losses(version, codec, platform):
    """Of images that show all answers in colors, and of latents that were cached."""
    config = configured(version, platform, "binary" if codec == "cached" else codec)
    if codec == "cached":
        data = dataclasses.replace(config.data, latent_cache="DIR")
        loss = dataclasses.replace(config.loss, mask_weight=0.2)
        config = dataclasses.replace(config, data=data, loss=loss)
    parts = Architecture.of(config.model)
    task = programs.abstract_task(config, parts)
    batch = programs.train_batch(task, parts, 8)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8))
    text = lowered(task.loss, platform, task.abstract, task.frozen, batch, keys)
    assert CALLS[platform] in text


@pytest.mark.parametrize(
    ("version", "codec", "platform"),
    lowered_once(
        {
            ("sd15", "binary"): "tpu",
            ("sd21", "binary"): "cuda",
            ("sd21_clip", "binary"): "tpu",
            ("sd15", "palette"): "cuda",
            ("sd15", "prompted"): "tpu",
        },
    ),
)
def test_evaluation_and_prediction_of_150_classes(version, codec, platform, monkeypatch):
    """8x2 with every decoder; a coarse pass first, which asks for all classes at once."""
    config = configured(version, platform, codec)
    compiled = dataclasses.replace(config.compile, program="eval", eval_queries=CLASSES)
    config = dataclasses.replace(config, compile=compiled)
    parts, mesh = Architecture.of(config.model), make_mesh(config.mesh)
    task = programs.abstract_task(config, parts)
    trace, known, texts = programs.prediction.trace, {}, {}

    def traced_once(program, shared, batch, mesh):
        """A program that several decoders have in common is traced and lowered for the first one."""
        key = repr((program.func.__name__, program.keywords, batch))
        if key not in known:
            traced = trace(program, shared, batch, mesh)
            known[key] = types.SimpleNamespace(lower=functools.cache(traced.lower))
        return known[key]

    monkeypatch.setattr(programs.prediction, "trace", traced_once)
    for decoder in ("vae", "latent_mean", "probe"):
        settings = dataclasses.replace(config.eval, decoder=decoder, exhaustive_limit=64)
        task.config = dataclasses.replace(config, eval=settings)
        with assumed_cudnn():
            made = programs.lower(task, parts, mesh, platform)
        for program in made:
            texts.setdefault(id(program.lowered), (program.name, program.lowered.as_text()))
        assert ("coarse" in {program.name for program in made}) == (codec != "palette"), "it is closed"
    assert all(CALLS[platform] in text for name, text in texts.values() if name != "read")
    assert {"sample", "read"} <= {name for name, _ in texts.values()}
