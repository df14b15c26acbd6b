# SPDX-License-Identifier: Apache-2.0
"""What the check runs on: Stable Diffusion 1.5's models with random weights, and made-up images."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from digseg_jax.config.parse import parse
from digseg_jax.config.schema import Config
from digseg_jax.models import functional
from digseg_jax.models.text.clip_text import ClipTextConfig, CLIPTextModel
from digseg_jax.models.text.tokenizer import CLIP_END
from digseg_jax.models.unet import UNet2DConditionModel, UNetConfig
from digseg_jax.models.vae import AutoencoderKL, VaeConfig
from digseg_jax.recipes import stable_diffusion
from digseg_jax.weights import save_component
from tests.hub.vocabulary import write_clip

CLASSES = ("sky", "road", "tree", "water")


@dataclasses.dataclass(frozen=True)
class Size:
    """Widths, pixels and counts of a check."""

    unet: UNetConfig
    vae: VaeConfig
    text: ClipTextConfig
    pixels: int
    steps: int


FULL = Size(
    UNetConfig(),
    VaeConfig(),
    ClipTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12),  # CLIP ViT-L/14
    pixels=512,
    steps=12,
)
# the same classes, levels, places of attention and tokens, few channels and layers
TINY = Size(
    UNetConfig(
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
    ),
    VaeConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4),
    ClipTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
    pixels=64,
    steps=3,
)


def write(folder: Path, size: Size) -> Config:
    """Writes models and images; returns the public recipe's configuration for them."""
    _write_models(folder / "models", size)
    _write_pictures(folder / "pictures", size.pixels)
    recipe = stable_diffusion("sd15", "folder")

    recipe.data.root, recipe.loading.workers = str(folder / "pictures"), 0
    recipe.data.image_size, recipe.data.num_queries = size.pixels, 2
    recipe.model.vae = str(folder / "models" / "vae")
    recipe.model.unet = str(folder / "models" / "unet")
    recipe.model.text = str(folder / "models" / "text_encoder")

    recipe.train.steps, recipe.train.batch_size, recipe.logging.every = size.steps, 4, 1
    recipe.checkpoint.every, recipe.checkpoint.keep = size.steps, 1
    recipe.eval.num_images, recipe.eval.batch_size = 2, 1
    return parse(recipe)


def _write_models(folder: Path, size: Size) -> None:
    for name, model_class, config in (
        ("unet", UNet2DConditionModel, size.unet),
        ("vae", AutoencoderKL, size.vae),
        ("text_encoder", CLIPTextModel, size.text),
    ):
        make = partial(model_class, config, rngs=functional.FixedRngs())
        params = functional.random_init(functional.abstract(make)[1], seed=1)
        save_component((config, params), folder / name)
    write_clip(folder / "tokenizer", CLIP_END)


def _write_pictures(folder: Path, pixels: int) -> None:
    """Quarters of four classes, each with a brightness and noise of its own, shifted from one image
    to the next."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for i in range(count):
            half = np.arange(pixels) < pixels // 2
            label = np.roll(2 * half[:, None] + half[None], i * pixels // 7, axis=(0, 1))
            image = 50 * label[..., None] + rng.integers(0, 60, (pixels, pixels, 3))
            for kind, values in (("images", image), ("masks", label)):
                path = folder / kind / split / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values.astype(np.uint8)).save(path)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")
