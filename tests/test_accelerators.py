# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion's programs at full size, lowered for GPUs and TPUs with what `auto` chooses there.

Only shapes: nothing is downloaded, drawn or compiled, and no accelerator is needed.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from digseg_jax import config as config_lib
from digseg_jax.aot import programs, shapes
from digseg_jax.aot.cuda import assumed_cudnn
from digseg_jax.aot.shapes import Parts, ShapeTask
from digseg_jax.config import Config, MeshConfig
from digseg_jax.recipes import stable_diffusion
from digseg_jax.segmentation.inference import EStep, probabilities
from digseg_jax.sharding import make_mesh, on_mesh
from digseg_jax.tasks.components import for_devices

DEVICES = {
    "cuda": types.SimpleNamespace(platform="cuda", compute_capability="9.0"),
    "tpu": types.SimpleNamespace(platform="tpu"),
}
CHOSEN = {"cuda": "cudnn", "tpu": "splash"}
CALLS = {"cuda": "@__cudnn$fmhaSoftmax", "tpu": "@tpu_custom_call"}  # of the kernels of `auto`
ESTEP = EStep(8, 2, "trailing")
CLASSES = 150

platforms = pytest.mark.parametrize("platform", CHOSEN)
versions = pytest.mark.parametrize("version", ["sd15", "sd21"])


def configured(version: str, platform: str, codec: str = "binary") -> Config:
    """A public recipe as that platform computes it."""
    recipe = stable_diffusion(version, "ade20k")
    recipe.segmentation.codec = codec
    recipe.mesh.data, recipe.mesh.fsdp = 2, 4
    config = for_devices(config_lib.parse(recipe), [DEVICES[platform]])
    assert config.model.attention == CHOSEN[platform]
    return config


def lowered(function: Any, platform: str, *arguments: Any) -> str:
    """The program of a function of shapes, on a mesh of eight."""
    with assumed_cudnn():
        step = jax.jit(on_mesh(make_mesh(MeshConfig(2, 4, 1)), function))
        return step.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@platforms
@versions
def test_the_train_step(version, platform):
    config = configured(version, platform)
    parts, mesh = Parts.of(config.model), make_mesh(config.mesh)
    task, batch = programs.train_task(config, parts, config.train.batch_size)
    with assumed_cudnn():
        step = programs.lower_step(config, task, batch, mesh, platform)
    assert CALLS[platform] in step.as_text()


@platforms
@pytest.mark.parametrize(
    ("version", "codec"), [("sd15", "palette"), ("sd21", "palette"), ("sd15", "cached")]
)
def test_other_losses(version, platform, codec):
    """Of the palette's pictures, and of latents that were cached."""
    config = configured(version, platform, "palette" if codec == "palette" else "binary")
    if codec == "cached":
        data = dataclasses.replace(config.data, latent_cache="DIR")
        diffusion = dataclasses.replace(config.diffusion, mask_loss_weight=0.2)
        config = dataclasses.replace(config, data=data, diffusion=diffusion)
    task, batch = programs.train_task(config, Parts.of(config.model), 8)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8))
    text = lowered(task.loss, platform, task.abstract, task.frozen, batch, keys)
    assert CALLS[platform] in text


@platforms
@pytest.mark.parametrize(
    ("version", "codec"), [("sd15", "binary"), ("sd21", "binary"), ("sd15", "palette")]
)
@pytest.mark.parametrize("decoder", ["vae", "latent_mean", "probe"])
def test_evaluation_of_all_classes(version, platform, codec, decoder):
    config = configured(version, platform, codec)
    prompts = 1 if codec == "palette" else CLASSES
    task = ShapeTask(config, Parts.of(config.model), prompts)

    def evidence(params, frozen, image, index):
        return task.evidence(params, frozen, image, index, ESTEP, decoder=decoder)

    batch = shapes.eval_batch(config, 8)
    arguments = (task.abstract, task.frozen, batch["image"], batch["index"])
    assert CALLS[platform] in lowered(evidence, platform, *arguments)


@platforms
@versions
def test_prediction(version, platform):
    """Four squares and 32 queries, as the predictor asks them: texts and noise come with the call."""
    config = configured(version, platform)
    task = ShapeTask(config, Parts.of(config.model), prompts=32)

    def program(params, frozen, image, index, bias, root):
        evidence = task.evidence(params, frozen, image, index, ESTEP, seed=root)
        return probabilities(evidence, 2.0, bias, codec="binary", rule="mean")

    batch, bias = shapes.eval_batch(config, 4), jax.ShapeDtypeStruct((32,), jnp.float32)
    root = jax.eval_shape(lambda: jax.random.key(0))
    arguments = (task.abstract, task.frozen, batch["image"], batch["index"], bias, root)
    assert CALLS[platform] in lowered(program, platform, *arguments)
