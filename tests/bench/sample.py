# SPDX-License-Identifier: Apache-2.0
"""The E-Step grid of ours against the same loop in torch diffusers: same weights, noise and threads.

Ours is one jitted program, that of `predict_masks` without its sigmoid: the image encoded once,
queries and members as batch axes, a scan over the steps, the decoded masks averaged over the members.
Torch's is what a user of diffusers writes, eager: for each query, each member, each step one call of
the U-Net. It encodes the image once too, as diffusers' `MarigoldDepthPipeline` does; Marigold's own
script encodes it again for each member, which would flatter ours. Each side runs in a process of its
own, torch's first, since it writes the random weights.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from digseg_jax.errors import UserError
from digseg_jax.log import log
from tests.bench.models import UNET, VAE
from tests.bench.sides import relative_l2, require_torch, run_side

ROWS = ("1x1", "1x2", "4x2", "8x2")
PIXELS = {"full": 256, "small": 64}
TOKENS = 77
SEED = 0  # of the members' noise
LIMIT = 1e-4  # relative L2 of the mean masks, above which the sides did not compute the same


def unet_config(size: str, pixels: int) -> dict[str, Any]:
    """The hub's config of the U-Net, with a second latent among its inputs."""
    return UNET[size] | {"in_channels": 8, "sample_size": pixels // factor(size)}


def factor(size: str) -> int:
    """Pixels of a latent cell's side."""
    return 2 ** (len(VAE[size]["block_out_channels"]) - 1)


def inputs(size: str, pixels: int, queries: int) -> dict[str, np.ndarray]:
    """image [1 H W 3], tokens [q l d]: the same numbers for both sides."""
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((queries, TOKENS, UNET[size]["cross_attention_dim"]), np.float32)
    return {"image": rng.integers(0, 256, (1, pixels, pixels, 3), np.uint8), "tokens": tokens}


def run(
    size: str = "full",
    *,
    pixels: int = 0,
    rows: tuple[str, ...] = ROWS,
    queries: int = 1,
    threads: int = 2,
    repeats: int = 2,
    torch_batch: int = 1,
    conv: str = "cpu",
    attention: str = "headwise",
) -> dict[str, Any]:
    """Times every row on both sides; `ratio` is our time divided by torch's, below 1 is faster.

    Args:
        pixels: a side of the image; 0: 256 for the full size, 64 for the small one.
        rows: such as "8x2", eight members and two steps.
        torch_batch: members that torch's U-Net and decoder take at a time; diffusers' default is 1.

    Raises:
        UserError: torch or diffusers is not installed, pixels that cannot be halved so often, a row
            that is no E-Step, or sides whose masks differ.
    """
    require_torch("sample", "diffusers")
    pixels = pixels or PIXELS[size]
    _check_pixels(size, pixels)
    spec = {
        "size": size,
        "pixels": pixels,
        "queries": queries,
        "threads": threads,
        "torch_batch": torch_batch,
        "repeats": repeats,
        "schedule": _schedule(),
        "options": {"conv": conv, "attention": attention},
        "rows": [str(row) for row in _parse(rows)],
    }
    with tempfile.TemporaryDirectory() as scratch:
        return spec | {"rows": _table(spec | {"folder": scratch}, Path(scratch))}


def _table(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    _write_noise(spec, folder)
    theirs = run_side("sample_torch", spec, "sample", f"size {spec['size']!r}")
    ours = run_side("sample_ours", spec, "sample", f"size {spec['size']!r}")
    return {row: _compare(row, ours[row], theirs[row], folder) for row in spec["rows"]}


def _parse(rows: tuple[str, ...]) -> list[Any]:
    from digseg_jax.config.sampling import EStep

    return [EStep.parse(row) for row in dict.fromkeys(rows)]


def _check_pixels(size: str, pixels: int) -> None:
    step = factor(size) * 2 ** (len(UNET[size].get("block_out_channels", [0] * 4)) - 1)
    if pixels < 1 or pixels % step:
        raise UserError(f"--pixels={pixels}: must be a multiple of {step} for the {size} size")


def _schedule() -> dict[str, Any]:
    """Our defaults, by the names of diffusers' scheduler."""
    from digseg_jax.config.sampling import NUM_TRAIN_TIMESTEPS
    from digseg_jax.config.schema import DiffusionConfig
    from digseg_jax.diffusion.schedule import BETA_END, BETA_START

    config = DiffusionConfig()
    return {
        "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
        "beta_start": BETA_START,
        "beta_end": BETA_END,
        "prediction_type": config.prediction_type,
        "rescale_betas_zero_snr": config.zero_snr,
    }


def _write_noise(spec: dict[str, Any], folder: Path) -> None:
    """The members' noise [e h w c] as our sampler draws it; a row takes the first of them."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from digseg_jax.config.sampling import EStep
    from digseg_jax.segmentation.sampling import member_noise

    members = max(EStep.parse(row).ensemble for row in spec["rows"])
    cells = spec["pixels"] // factor(spec["size"])
    noise = member_noise(SEED, np.zeros(1, np.int32), members, (cells, cells, 4))
    np.save(folder / "noise.npy", np.asarray(noise[0]))


def _compare(row: str, ours: dict[str, Any], theirs: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One line of the table.

    Raises:
        UserError: the masks differ, so that the times are not those of the same thing.
    """
    own, other = (np.load(folder / f"{side}_{row}.npy") for side in ("ours", "torch"))
    distance = relative_l2(own, other)
    if not distance <= LIMIT:
        raise UserError(f"bench sample: masks of row {row} differ, relative L2 {distance:.2e}")
    result = {
        "ratio": ours["seconds"] / theirs["seconds"],
        "cpu_ratio": ours["cpu_seconds"] / theirs["cpu_seconds"],  # other work disturbs it less
        "relative_l2": distance,
        "mask_deviation": float(other.std()),  # random weights must not make it a constant
        "ours": ours | {"images_per_second": 1.0 / ours["seconds"]},
        "torch": theirs | {"images_per_second": 1.0 / theirs["seconds"]},
    }
    log.info("%s: %s", row, result)
    return result
