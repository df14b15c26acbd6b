# SPDX-License-Identifier: Apache-2.0
"""Adapts frozen text tokens to the U-Net's cross-attention: a small network for each resolution."""

from __future__ import annotations

import jax
from flax import nnx

from digseg_jax.arraytypes import Array, Float
from digseg_jax.models.layers import Compute, Shared, layer_norm, linear


class TextAdapter(nnx.Module):
    """tokens + MLP(LayerNorm(tokens)); unequal widths get a linear map in place of the first term."""

    def __init__(self, features: int, out_features: int, *, compute: Compute, rngs: nnx.Rngs):
        options: Shared = {"compute": compute, "rngs": rngs}
        self.norm = layer_norm(features, **options)
        self.fc1 = linear(features, out_features, **options)
        self.fc2 = linear(out_features, out_features, **options)

        # Unequal widths cannot be added: the tokens are projected first.
        if features != out_features:
            self.proj = linear(features, out_features, **options)

    def __call__(self, tokens: Float[Array, "b l d"]) -> Float[Array, "b l e"]:
        base = self.proj(tokens) if hasattr(self, "proj") else tokens
        return base + self.fc2(jax.nn.gelu(self.fc1(self.norm(tokens)), approximate=False))
