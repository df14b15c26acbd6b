# SPDX-License-Identifier: Apache-2.0
"""Step 0 of the U-Net: a parallel text pathway changes nothing yet; misfits are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import hub
import jax
import numpy as np
import pytest
import tiny

from digseg_jax import trees
from digseg_jax.config.parse import parse
from digseg_jax.config.schema import Config
from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.models.unet import UNet2DConditionModel
from digseg_jax.recipes import stable_diffusion
from digseg_jax.training.tasks.segmentation import SegmentationTask, load_task
from digseg_jax.training.tasks.unet_start import encode_empty, native_text
from digseg_jax.weights import load_config, load_text_tower, load_unet_params

PIPELINES = {"sd15": "sd-1.5", "sd21": "sd-2.1"}


def pipeline(repositories: Path, version: str, text: str = "", **changes) -> Config:
    """A recipe on the miniature repositories, with a parallel pathway."""
    values = stable_diffusion(version, "camvid")
    for name, folder in hub.pipeline_folders(repositories, PIPELINES[version]).items():
        values.model[name] = folder
    values.model.update(dtype="float32", text_injection="parallel", text=text or values.model.text)
    values.compute.update(attention="plain", remat="none")
    values.data.update(image_size=64)
    for key, value in changes.items():
        section, name = key.split("__")
        values[section][name] = value
    return parse(values)


def inputs(task: SegmentationTask, n: int = 2) -> tuple[np.ndarray, ...]:
    """Made-up latents, timesteps, and the tokens and masks of the first queries."""
    image, x = np.random.default_rng(0).standard_normal((2, n, 8, 8, 4), np.float32)
    bank = task.frozen["bank"]
    return image, x, np.array([3, 999])[:n], bank["tokens"][:n], bank["mask"][:n]


def pretrained(config: Config, task: SegmentationTask) -> np.ndarray:
    """The widened pretrained U-Net's output for the same latents and its own empty prompt."""
    unet = dataclasses.replace(load_config(config.model.unet), in_channels=8)
    graphdef, _ = functional.abstract(lambda: UNet2DConditionModel(unet, rngs=functional.FixedRngs()))
    params = load_unet_params(config.model.unet, unet)
    tokens = encode_empty(load_text_tower(native_text(config.model)), config.model)
    image, x, t, *_ = inputs(task)

    def predict(params, x, t, tokens):
        return functional.merge(graphdef, params)(x, t, tokens)

    return np.asarray(
        jax.jit(predict)(params, np.concatenate([image, x], axis=-1), t, np.stack([tokens] * len(x)))
    )


@pytest.mark.parametrize("version", PIPELINES)
def test_a_parallel_pathway_starts_as_the_pretrained_unet_to_the_last_bit(repositories, version):
    config = pipeline(repositories, version)
    task = load_task(config)
    params, predict = task.initial(), jax.jit(task.predict_latent)
    assert task.unet_config.prompt_length == 77
    expected = pretrained(config, task)
    np.testing.assert_array_equal(predict(params, *inputs(task)), expected)

    # One update of the second attention's output is enough for the text to be heard.
    flat = trees.flatten(params)
    outs = [path for path in flat if path.endswith(".attn2.text.to_out.0.kernel")]
    assert len(outs) == 16  # every transformer of a Stable Diffusion
    flat |= {path: flat[path] + 0.1 for path in outs}
    assert np.abs(predict(trees.unflatten(flat), *inputs(task)) - expected).max() > 1e-3
