# SPDX-License-Identifier: Apache-2.0
"""What the parity tests and the scripts in tests/golden share.

Weights are drawn from the hub key itself, so a golden file needs to hold outputs only.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from digseg_jax import trees
from digseg_jax.models import functional
from digseg_jax.weights import keymap, load_component
from digseg_jax.weights.registry import component_of
from digseg_jax.weights.safetensors_io import write_component

GOLDEN = Path(__file__).parents[1] / "golden"
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [16, 24, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 32,
}
TINY_VAE = {
    "_class_name": "AutoencoderTiny",
    "encoder_block_out_channels": [12, 12, 12],
    "decoder_block_out_channels": [8, 8, 8],
    "num_encoder_blocks": [1, 2, 1],
    "num_decoder_blocks": [2, 1, 1],
    "latent_channels": 4,
}
_UNET = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 16,
    "block_out_channels": [16, 32, 48],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "cross_attention_dim": 20,
}
UNETS = {
    # Stable Diffusion 1.x: convolutions around the attention; "attention_head_dim" is the heads
    "sd1": _UNET | {"attention_head_dim": 4, "layers_per_block": 1},
    # Stable Diffusion 2.x: linear layers there; heads per level
    "sd2": _UNET
    | {
        "block_out_channels": [16, 32],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": [2, 4],
        "use_linear_projection": True,
    },
}


def seeded_tensor(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor for a hub key; no layer is zero, one or constant, so none can hide an error.

    RandomState's stream is frozen across numpy versions. Kernels keep the scale of activations.
    """
    noise = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if len(shape) > 1:
        return (noise / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    offset = 1.0 if key.endswith("weight") else 0.0  # norm scales lie around one
    return np.asarray(offset + 0.2 * noise, np.float32)


def seeded_input(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A standard normal input, float32."""
    rng = np.random.RandomState(zlib.crc32(name.encode()))
    return rng.standard_normal(shape).astype(np.float32)


def relative_l2(actual: np.ndarray, expected: np.ndarray) -> float:
    """|actual - expected| / |expected| in float64; shapes must be equal."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{actual.shape} against {expected.shape}"
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def seeded_component(config: dict[str, Any], folder: Path) -> nnx.Module:
    """Our model of a hub config with seeded weights, by way of a checkpoint in `folder`."""
    component = component_of(config, "test")
    ours = component.config_class.from_dict(config)
    _, params = functional.abstract(lambda: component.model_class(ours, rngs=functional.FixedRngs()))
    tensors = {}
    for path, leaf in trees.flatten(params).items():
        key = keymap.hub_key(path)
        tensors[key] = seeded_tensor(key, keymap.hub_shape(path, leaf.shape))
    write_component(folder, config, tensors, component.stem)
    return load_component(folder)


def run(model: nnx.Module, method: str, *args: Any) -> Any:
    """Calls a method of a model as one compiled program; at level 0, since it runs but once."""
    graphdef, params = functional.split(model)
    call = jax.jit(
        lambda p, *a: getattr(functional.merge(graphdef, p), method)(*a),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return call(params, *args)


def nhwc(x: np.ndarray) -> np.ndarray:
    """From torch's NCHW."""
    return np.moveaxis(np.asarray(x), 1, -1)


def fill_torch(model) -> None:
    """Sets every parameter of a torch module to its seeded tensor."""
    import torch

    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(seeded_tensor(key, tuple(parameter.shape))))
    model.eval()


def unet_inputs(size: tuple[int, int] = (8, 12)) -> tuple[np.ndarray, ...]:
    """sample [2,4,h,w], timestep [2], text [2,7,20], mask [2,7] of both small U-Nets."""
    mask = np.arange(7)[None] < np.array([[7], [3]])
    timestep = np.array([981, 17], np.int64)
    return (
        seeded_input("sample", (2, 4, *size)),
        timestep,
        seeded_input("text", (2, 7, 20)),
        mask,
    )


def torch_unet_output(model, sample, timestep, text, mask=None) -> np.ndarray:
    """Prediction of a torch U-Net, NCHW."""
    import torch

    with torch.no_grad():
        return model(
            torch.from_numpy(sample),
            torch.from_numpy(timestep),
            torch.from_numpy(text),
            encoder_attention_mask=None if mask is None else torch.from_numpy(mask),
        ).sample.numpy()
