# SPDX-License-Identifier: Apache-2.0
"""Initial weights for small autoencoders: random, except that colors pass through exactly.

Group normalization discards absolute values, so a small AutoencoderKL spends most of a short training
on learning the color of each cell, and stays some 2 % off. Here six channels of the residual stream
carry (r, g, b, -r, -g, -b) unchanged: residual branches start at zero, strided convolutions average 2x2
pixels, upsampling repeats. Two more channels hold constants (K, -K) at the end, which fix mean and
deviation of their group in the last norm, and silu(x) - silu(-x) = x undoes the activation. So the
network starts as block averages and their enlargement, and learns detail from there.
"""

from __future__ import annotations

import math

import numpy as np

from digseg_jax.arraytypes import Params
from digseg_jax.errors import UserError
from digseg_jax.models.vae import VaeConfig
from digseg_jax.trees import flatten, unflatten

CARRIED = 6  # r, g, b, -r, -g, -b
RESERVED = CARRIED + 2  # and K, -K, which are added by the last residual branch
K = 8.0  # far above the colors' range of [-1, 1], so that the group's deviation is nearly constant
LOGVAR = -6.0  # initial log-variance of the posterior

# Rows are latents: brightness, red - green, green - blue, scaled to similar deviations on satellite
# images.
COLOR_TO_LATENT = np.array([[0.5, 0.5, 0.5], [8.0, -8.0, 0.0], [0.0, 4.5, -4.5]])


def carry_colors(params: Params, config: VaeConfig) -> Params:
    """Adds the color path to the parameters of an AutoencoderKL (float32 NumPy arrays).

    The first three latents are the cells' mean color times COLOR_TO_LATENT; the others stay random.

    Raises:
      UserError: an architecture without room for the eight channels.
    """
    narrowest = min(config.block_out_channels)
    if narrowest // config.norm_num_groups < RESERVED or config.latent_channels < 3:
        raise UserError(
            f"a color path needs {RESERVED} channels in each group of every level and 3 latents: got "
            f"block_out_channels={config.block_out_channels}, norm_num_groups={config.norm_num_groups},"
            f" latent_channels={config.latent_channels}"
        )

    # Residual branches start at zero; everything else on the way passes the carried channels on.
    flat = {path: np.array(value) for path, value in flatten(params).items()}
    for path, kernel in flat.items():
        if not path.endswith(".kernel"):
            continue

        if ".conv2." in path:
            kernel[:] = 0.0
        elif ".conv_shortcut." in path or "samplers." in path:
            _pass_through(kernel, stride=2 if "downsamplers." in path else 1)

    # At both ends of encoder and decoder: colors in, constants into the last norm, colors out.
    widths, last_resnet = config.block_out_channels, config.layers_per_block
    last = {
        "encoder": ("mid_block.resnets.1", widths[-1]),
        "decoder": (f"up_blocks.{len(widths) - 1}.resnets.{last_resnet}", widths[0]),
    }
    for part, (resnet, width) in last.items():
        _lay_ends(flat, part)

        # The constants enter with the last residual branch. The norm divides by the group's deviation,
        # which is nearly theirs alone; its scale multiplies by it again.
        flat[f"{part}.{resnet}.conv2.bias"][CARRIED:RESERVED] = K, -K
        deviation = K * math.sqrt(2.0 * config.norm_num_groups / width)
        flat[f"{part}.conv_norm_out.scale"][:RESERVED] = deviation

    _moments(flat, config.latent_channels)
    return unflatten(flat)


def _pass_through(kernel: np.ndarray, stride: int) -> None:
    """Maps the carried channels to themselves, averaged over 2x2 if strided (taps 0 and 1 of 3)."""
    kernel[:, :, :, :RESERVED] = 0.0
    taps = slice(0, 2) if stride == 2 else slice(kernel.shape[0] // 2, kernel.shape[0] // 2 + 1)
    kernel[taps, taps, :CARRIED, :CARRIED] = np.eye(CARRIED) / stride**2


def _lay_ends(flat: dict[str, np.ndarray], part: str) -> None:
    """Makes conv_in split colors (of pixels or latents) into the carried channels; conv_out joins."""
    # In: split each color into its positive and its negative copy.
    color = np.eye(3) if part == "encoder" else np.linalg.inv(COLOR_TO_LATENT)  # from 3 inputs
    kernel = flat[f"{part}.conv_in.kernel"]
    middle = kernel.shape[0] // 2
    kernel[..., :RESERVED] = 0.0
    kernel[middle, middle, :3, :3], kernel[middle, middle, :3, 3:6] = color.T, -color.T

    # Out: their difference, which undoes the activation between.
    join = COLOR_TO_LATENT if part == "encoder" else np.eye(3)
    kernel = flat[f"{part}.conv_out.kernel"]
    kernel[..., :3] = 0.0
    kernel[middle, middle, :3, :3], kernel[middle, middle, 3:6, :3] = join.T, -join.T


def _moments(flat: dict[str, np.ndarray], channels: int) -> None:
    """Makes the 1x1 convolutions pass means unchanged, and log-variances start as a constant."""
    flat["encoder.conv_out.kernel"][..., channels:] = 0.0
    flat["quant_conv.kernel"][:] = np.eye(2 * channels)
    flat["quant_conv.bias"][channels:] = LOGVAR
    flat["post_quant_conv.kernel"][:] = np.eye(channels)
