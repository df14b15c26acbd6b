# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion's U-Net with optional text adapters, one for each resolution level."""

from functools import partial

import torch
from diffusers import UNet2DConditionModel
from torch import nn

OURS = ("encoder_hid_dim_type", "digseg", "text_adapters", "text_dim")  # keys that diffusers lacks


class TextAdapter(nn.Module):
    """tokens + MLP(LayerNorm(tokens)); if the widths differ, the first term is a linear map of them."""

    def __init__(self, features, out_features):
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.fc1, self.fc2 = nn.Linear(features, out_features), nn.Linear(out_features, out_features)
        self.proj = nn.Identity() if features == out_features else nn.Linear(features, out_features)

    def forward(self, tokens):
        """Adapted tokens [n, l, out_features] from text tokens [n, l, features]."""
        return self.proj(tokens) + self.fc2(nn.functional.gelu(self.fc1(self.norm(tokens))))


class DigsegUNet2DConditionModel(UNet2DConditionModel):
    """U-Net that reads [image latent, noisy mask latent] and predicts for the mask latent."""

    @classmethod
    def from_config(cls, config, **options):
        """Builds the U-Net, and one adapter per level if config.json asks for them."""
        # Diffusers rejects or drops these keys: take them out, and record them at the end.
        ours = {key: config[key] for key in OURS if key in config}
        model = super().from_config({k: v for k, v in config.items() if k not in ours}, **options)

        # Adapters map tokens of width text_dim to the width of cross-attention.
        if ours.get("text_adapters"):
            width = model.config.cross_attention_dim
            features, levels = ours["text_dim"] or width, len(model.down_blocks)
            model.text_adapters = nn.ModuleList(TextAdapter(features, width) for _ in range(levels))

            # The lowest resolution's adapter serves the middle block too; the up blocks begin there.
            blocks = [*model.down_blocks, model.mid_block, *model.up_blocks]
            adapters = [*model.text_adapters, model.text_adapters[-1], *reversed(model.text_adapters)]
            for block, adapter in zip(blocks, adapters, strict=True):
                block.register_forward_pre_hook(partial(_adapt, adapter), with_kwargs=True)
        model.register_to_config(**ours)
        return model


def _adapt(adapter, _block, arguments, options):
    """Forward pre-hook: passes a block the tokens of its level's adapter."""
    tokens = options.get("encoder_hidden_states")
    if isinstance(tokens, torch.Tensor):  # blocks without cross-attention get no tokens
        options = options | {"encoder_hidden_states": adapter(tokens)}
    return arguments, options
