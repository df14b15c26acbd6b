# SPDX-License-Identifier: Apache-2.0
"""An export in torch: its U-Net's numbers, and the masks of its pipeline, against ours."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from oracle import nhwc, relative_l2, seeded_input, torch_unet_output
from oracle import run as run_model

from digseg_jax.prediction.description import read_description
from digseg_jax.prediction.pretrained import load_segmenter
from digseg_jax.weights import load_component

LIMIT = 1e-5  # relative L2
MASK_LIMIT = 1e-4  # of a probability, any pixel's
STEPS, SEED = 2, 7  # of a mask's sampling


def check_export(folder: Path, cells: int = 8) -> bool:
    """Whether torch is installed; if it is, its U-Net must give our numbers for these weights."""
    if importlib.util.find_spec("torch") is None:
        return False
    ours, theirs = load_component(folder / "unet"), opened(folder).unet.eval()
    width = (ours.config.text_dim or ours.config.cross_attention_dim) + ours.config.mark_width
    sample = seeded_input("sample", (2, ours.config.in_channels, cells, cells))
    timestep, text = np.array([981, 17]), seeded_input("text", (2, 77, width))
    expected = nhwc(torch_unet_output(theirs, sample, timestep, text))
    actual = run_model(ours, "__call__", nhwc(sample), jnp.asarray(timestep), text)
    assert relative_l2(actual, expected) <= LIMIT
    return True


def check_mask(folder: Path, side: int, query: str = "wall") -> float:
    """The largest difference between our mask and that of torch's pipeline, for the same seed.

    One member, two steps. folder: an export. side: of the image, in pixels.
    """
    image = np.random.default_rng(0).integers(0, 256, (side // 16, side // 16, 3))
    image = np.kron(image, np.ones((16, 16, 1), np.int64)).astype(np.uint8)
    config = read_description(folder).training_config(folder)
    model = dataclasses.replace(config.model, dtype="float32")
    segmenter = load_segmenter(folder, dataclasses.replace(config, model=model))
    ours = segmenter(image, query, 1, STEPS, seed=SEED).probability
    theirs = opened(folder)(image, query, steps=STEPS, seed=SEED).probability
    assert ours.std() > 0.01, "an even mask compares nothing"
    difference = float(np.abs(ours - theirs).max())
    assert difference <= MASK_LIMIT, difference
    return difference


def opened(folder: Path):
    """The export as torch's diffusers opens it, with the code that it brings."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
