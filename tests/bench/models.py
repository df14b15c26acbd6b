# SPDX-License-Identifier: Apache-2.0
"""Our models against torch diffusers on the CPU: same weights, same inputs, same threads, one run.

Each side runs in a process of its own, one after the other: torch writes random weights with
`save_pretrained`, times itself and ends; then ours loads those files and times the jitted programs.
A time is the best of several repeats, which other work on the machine disturbs least; processor time
is given too.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from digseg_jax.log import log
from tests.bench.sides import relative_l2, require_torch, run_side

PASSES = ("forward", "forward_backward", "train_step")
# of AdamW, the same on both sides
ADAMW = {"learning_rate": 1e-5, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01}

# component -> hub class and config, per size; the full ones are Stable Diffusion 1.5's defaults
UNET = {
    "full": {"sample_size": 64, "cross_attention_dim": 768},
    "small": {
        "sample_size": 16,
        "block_out_channels": [16, 32],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 2,
        "cross_attention_dim": 24,
    },
}
_LEVELS = {"full": [128, 256, 512, 512], "small": [8, 8, 8, 8]}
VAE = {
    size: {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2 if size == "full" else 1,
        "norm_num_groups": 32 if size == "full" else 4,
    }
    for size, widths in _LEVELS.items()
}
PIXELS = {"full": 512, "small": 32}
CASES = {
    "unet": ("UNet2DConditionModel", UNET),
    "vae_encode": ("AutoencoderKL", VAE),
    "vae_decode": ("AutoencoderKL", VAE),
}


def inputs(case: str, size: str, cells: int = 0) -> list[np.ndarray]:
    """Arguments of one call, channels first: the same numbers for both sides.

    cells: a side of the U-Net's latents; 0: the size's own.
    """
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    if case == "unet":
        cells = cells or UNET[size]["sample_size"]
        tokens = normal(1, 77, UNET[size]["cross_attention_dim"])
        return [normal(1, 4, cells, cells), np.full((1,), 500, np.int32), tokens]
    if case == "vae_encode":
        return [normal(1, 3, PIXELS[size], PIXELS[size])]
    return [normal(1, 4, PIXELS[size] // 8, PIXELS[size] // 8)]


def run(
    size: str = "full",
    *,
    cases: tuple[str, ...] = tuple(CASES),
    passes: tuple[str, ...] = PASSES[:2],
    threads: int = 2,
    repeats: int = 3,
    conv: str = "cpu",
    attention: str = "headwise",
    cells: int = 0,
) -> dict[str, Any]:
    """Times every case on both sides; `ratio` is ours divided by torch's, below 1 is faster.

    Raises:
        UserError: torch or diffusers is not installed.
    """
    require_torch("models", "diffusers")
    result: dict[str, Any] = {"size": size, "threads": threads, "best_of": repeats, "cases": {}}
    result |= {"conv": conv, "attention": attention}
    for case in cases:
        with tempfile.TemporaryDirectory() as scratch:
            spec = {
                "case": case,
                "size": size,
                "cells": cells,
                "passes": passes,
                "threads": threads,
                "repeats": repeats,
                "folder": scratch,
                "options": {"conv": conv, "attention": attention},
            }
            torch_times = _worker("models_torch", spec)
            ours = _worker("models_ours", spec)
            result["cases"][case] = _compare(torch_times, ours, Path(scratch))
        log.info("%s: %s", case, result["cases"][case])
    return result


def _worker(module: str, spec: dict[str, Any]) -> dict[str, Any]:
    return run_side(module, spec, "models", f"case {spec['case']!r}")


def _compare(theirs: dict[str, Any], ours: dict[str, Any], folder: Path) -> dict[str, Any]:
    outputs = [np.load(folder / f"{side}.npy") for side in ("ours", "torch")]
    row: dict[str, Any] = {"relative_l2": relative_l2(*outputs)}
    for name in PASSES:
        if name not in ours:
            continue
        row[name] = {
            "ratio": ours[name]["seconds"] / theirs[name]["seconds"],
            "ours": ours[name],
            "torch": theirs[name],
        }
        if "loss" in ours[name]:  # after as many steps as were timed: did both learn the same?
            own, other = ours[name]["loss"], theirs[name]["loss"]
            row[name]["loss_difference"] = abs(own - other) / abs(other)
    return row | {"compile_seconds": ours["compile_seconds"]}
