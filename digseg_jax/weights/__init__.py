# SPDX-License-Identifier: Apache-2.0
"""Reads and writes checkpoints of diffusers and transformers as parameter trees, without torch."""

from digseg_jax.packages import locate, minilm_folder
from digseg_jax.weights.conv_in import load_unet_params, narrow_conv_in, widen_conv_in
from digseg_jax.weights.hub import resolve
from digseg_jax.weights.load import load_component, load_config, load_params, save_component
from digseg_jax.weights.safetensors_io import read_metadata
from digseg_jax.weights.text_tower import TextTower, load_text_tower

__all__ = [
    "TextTower",
    "load_component",
    "load_config",
    "load_params",
    "load_text_tower",
    "load_unet_params",
    "locate",
    "minilm_folder",
    "narrow_conv_in",
    "read_metadata",
    "resolve",
    "save_component",
    "widen_conv_in",
]
