# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion's U-Net with text adapters, parallel attentions to the text, or marked texts."""

from functools import partial

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import nn

# keys that diffusers lacks
OURS = ("encoder_hid_dim_type", "digseg", "text_adapters", "text_dim", "prompt_length", "mark_width")


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


class ParallelAttention(Attention):
    """Cross-attention to a prompt of its own, and beside it a second one to the text of the query."""

    def __init__(self, first, prompt_length, text_features):
        # The first attention is built anew, as diffusers has built it; its weights are loaded later.
        same = {"heads": first.heads, "dim_head": first.inner_dim // first.heads}
        width = first.query_dim
        super().__init__(width, first.cross_attention_dim, **same)
        self.prompt = nn.Embedding(prompt_length, first.cross_attention_dim)
        self.text = Attention(width, text_features, **same)
        self.weight = nn.Parameter(torch.ones(1))  # the second attention's scale

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, **options):
        """Sum of both attentions; the tokens and their mask are the text's."""
        prompt = self.prompt.weight.expand(len(hidden_states), -1, -1)
        own = super().forward(hidden_states, prompt, **options)
        text = self.text(hidden_states, encoder_hidden_states, attention_mask, **options)
        return own + self.weight * text


class DigsegUNet2DConditionModel(UNet2DConditionModel):
    """U-Net that reads [image latent, noisy mask latent] and predicts for the mask latent."""

    @classmethod
    def from_config(cls, config, **options):
        """Builds the U-Net, with the adapters and parallel attentions that config.json asks for."""
        # Diffusers rejects or drops these keys: take them out, and record them at the end.
        ours = {key: config[key] for key in OURS if key in config}
        model = super().from_config({k: v for k, v in config.items() if k not in ours}, **options)

        # A second attention beside every cross-attention reads the text, as the adapters leave it.
        width = model.config.cross_attention_dim
        features = ours.get("text_dim") or width
        if length := ours.get("prompt_length"):
            read = width if ours["text_adapters"] else features
            for block in [m for m in model.modules() if isinstance(m, BasicTransformerBlock)]:
                block.attn2 = ParallelAttention(block.attn2, length, read)

        # Features behind those of a text are mapped to its width and added to it.
        if width_of_marks := ours.get("mark_width"):
            model.mark_embedding = nn.Linear(width_of_marks, features)

        # Adapters map tokens of width text_dim to the width of cross-attention.
        if ours.get("text_adapters"):
            levels = len(model.down_blocks)
            model.text_adapters = nn.ModuleList(TextAdapter(features, width) for _ in range(levels))

            # The lowest resolution's adapter serves the middle block too; the up blocks begin there.
            blocks = [*model.down_blocks, model.mid_block, *model.up_blocks]
            adapters = [*model.text_adapters, model.text_adapters[-1], *reversed(model.text_adapters)]
            for block, adapter in zip(blocks, adapters, strict=True):
                block.register_forward_pre_hook(partial(_adapt, adapter), with_kwargs=True)
        model.register_to_config(**ours)
        return model

    def places(self, texts, marks, member):
        """Marks of so many texts; for each member of an ensemble they are shifted by one."""
        return [(place + member) % len(marks) for place in range(texts)]

    def colors(self, table, texts, marks, members):
        """Rows of a table of colors, [members, texts + 1, 3] for marked texts; else all of them."""
        if not marks:
            return torch.tensor(table)[None]
        every = [self.places(texts, marks, member) + [-1] for member in range(members)]
        return torch.tensor(table)[torch.tensor(every)]

    def marked(self, texts, marks, member):
        """One context [1, q, d] of q texts, each with the features of its mark behind it; its mask."""
        marks = torch.tensor(marks)[self.places(len(texts), marks, member)].to(texts)
        return torch.cat([texts, marks], 1)[None], torch.ones(1, len(texts), device=texts.device)

    def forward(self, sample, timestep, encoder_hidden_states, **options):
        """As diffusers has it; tokens [n, l, d] may have their marks behind the text's features."""
        if hasattr(self, "mark_embedding"):
            width = self.mark_embedding.out_features
            text, marks = encoder_hidden_states[..., :width], encoder_hidden_states[..., width:]
            encoder_hidden_states = text + self.mark_embedding(marks)
        return super().forward(sample, timestep, encoder_hidden_states, **options)


def _adapt(adapter, _block, arguments, options):
    """Forward pre-hook: passes a block the tokens of its level's adapter."""
    tokens = options.get("encoder_hidden_states")
    if isinstance(tokens, torch.Tensor):  # blocks without cross-attention get no tokens
        options = options | {"encoder_hidden_states": adapter(tokens)}
    return arguments, options
