# SPDX-License-Identifier: Apache-2.0
"""An export in torch: diffusers' U-Net, our text adapters in front of its cross-attention."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from oracle import nhwc, relative_l2, seeded_input, torch_unet_output
from oracle import run as run_model
from safetensors.numpy import load_file

from digseg_jax.weights import load_component

LIMIT = 1e-5  # relative L2
WEIGHTS = "diffusion_pytorch_model.safetensors"


def check_export(folder: Path, cells: int = 8) -> bool:
    """Whether torch is installed; if it is, its U-Net must give our numbers for these weights."""
    if importlib.util.find_spec("torch") is None:
        return False
    ours, theirs = load_component(folder), torch_unet(folder)
    width = ours.config.text_dim or ours.config.cross_attention_dim
    sample = seeded_input("sample", (2, ours.config.in_channels, cells, cells))
    timestep, text = np.array([981, 17]), seeded_input("text", (2, 77, width))
    expected = nhwc(torch_unet_output(theirs, sample, timestep, text))
    actual = run_model(ours, "__call__", nhwc(sample), jnp.asarray(timestep), text)
    assert relative_l2(actual, expected) <= LIMIT
    return True


def torch_unet(folder: Path):
    """diffusers' U-Net with the folder's weights; text goes through its adapters, if it has some."""
    import diffusers

    model, found = diffusers.UNet2DConditionModel.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["mismatched_keys"]
    assert all(key.startswith("text_adapters.") for key in found["unexpected_keys"])
    if found["unexpected_keys"]:
        _insert_adapters(model, load_file(folder / WEIGHTS))
    return model.eval()


def _insert_adapters(model, tensors: dict[str, np.ndarray]) -> None:
    """Each level's cross-attentions see the text as that level's adapter gives it."""
    levels = len(model.down_blocks)
    blocks = [*enumerate(model.down_blocks), (levels - 1, model.mid_block)]
    blocks += [(levels - 1 - i, block) for i, block in enumerate(model.up_blocks)]
    for level, block in blocks:
        adapt = _adapter(tensors, f"text_adapters.{level}")
        for name, module in block.named_modules():
            if name.endswith("attn2"):
                module.register_forward_pre_hook(_with_text(adapt), with_kwargs=True)


def _with_text(adapt):
    def hook(module, arguments, keywords):
        return arguments, keywords | {"encoder_hidden_states": adapt(keywords["encoder_hidden_states"])}

    return hook


def _adapter(tensors: dict[str, np.ndarray], prefix: str):
    """`models.text_adapters.TextAdapter`, written again in torch."""
    import torch
    from torch.nn import functional as F

    part = {key: torch.from_numpy(x) for key, x in tensors.items() if key.startswith(prefix + ".")}

    def linear(name: str, x):
        return F.linear(x, part[f"{prefix}.{name}.weight"], part[f"{prefix}.{name}.bias"])

    def adapt(tokens):
        weight, bias = part[f"{prefix}.norm.weight"], part[f"{prefix}.norm.bias"]
        normed = F.layer_norm(tokens, tokens.shape[-1:], weight, bias)
        base = linear("proj", tokens) if f"{prefix}.proj.weight" in part else tokens
        return base + linear("fc2", F.gelu(linear("fc1", normed)))

    return adapt
