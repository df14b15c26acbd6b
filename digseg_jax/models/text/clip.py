# SPDX-License-Identifier: Apache-2.0
"""The transformer of CLIP's text and image encoders, equal to transformers' at inference.

Pre-layer-norm. Attributes are named as in transformers, so a parameter path is the checkpoint key.
Source: Radford et al., arXiv:2103.00020; transformers `models/clip/modeling_clip.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import jax
from flax import nnx

from digseg_jax.arraytypes import Array, Bool, Float
from digseg_jax.errors import UserError
from digseg_jax.models.attention import attention
from digseg_jax.models.layers import Compute, Shared, layer_norm, linear


def _quick_gelu(x: Array) -> Array:
    """OpenAI's approximation of the GELU; weights trained with it do not fit the exact one."""
    return x * jax.nn.sigmoid(1.702 * x)


def _gelu(x: Array) -> Array:
    """The exact (erf) GELU."""
    return jax.nn.gelu(x, approximate=False)


# OpenAI's encoders use the first, OpenCLIP's (Stable Diffusion 2.x) the second.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"quick_gelu": _quick_gelu, "gelu": _gelu}


def check_tower(name: str, config: Any) -> None:
    """Raises UserError for an unknown activation, or a width that the heads do not divide."""
    if config.hidden_act not in ACTIVATIONS:
        legal = ", ".join(ACTIVATIONS)
        raise UserError(f"{name} config: hidden_act={config.hidden_act!r}; legal: {legal}")
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"{name} config: hidden_size {config.hidden_size} is not a multiple of "
            f"num_attention_heads {config.num_attention_heads}"
        )


class ClipAttention(nnx.Module):
    """Multi-head self-attention; `causal`: a token sees itself and earlier tokens only."""

    def __init__(self, width: int, heads: int, causal: bool, **options: Unpack[Shared]):
        self.heads, self.causal = heads, causal
        self.q_proj = linear(width, width, **options)
        self.k_proj = linear(width, width, **options)
        self.v_proj = linear(width, width, **options)
        self.out_proj = linear(width, width, **options)

    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None
    ) -> Float[Array, "b l d"]:
        # Split the channels into heads.
        parts = (f(x) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (a.reshape(*a.shape[:2], self.heads, -1) for a in parts)

        # Causal attention occurs in texts of 77 tokens at most: it needs no kernel of its own.
        if self.causal:
            keys = None if mask is None else mask[:, None, None, :]
            y = jax.nn.dot_product_attention(q, k, v, mask=keys, is_causal=True)
        else:
            y = attention(q, k, v, mask)

        return self.out_proj(y.reshape(x.shape))


class ClipMLP(nnx.Module):
    """Two linear layers around the activation."""

    def __init__(self, width: int, inner: int, activation: str, **options: Unpack[Shared]):
        self.activation = activation
        self.fc1 = linear(width, inner, **options)
        self.fc2 = linear(inner, width, **options)

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class ClipLayer(nnx.Module):
    """One layer: attention and feed-forward, each behind its norm and added to its input."""

    def __init__(self, config: Any, causal: bool, **options: Unpack[Shared]):
        d, eps = config.hidden_size, config.layer_norm_eps
        self.self_attn = ClipAttention(d, config.num_attention_heads, causal, **options)
        self.layer_norm1 = layer_norm(d, eps=eps, **options)
        self.mlp = ClipMLP(d, config.intermediate_size, config.hidden_act, **options)
        self.layer_norm2 = layer_norm(d, eps=eps, **options)

    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None
    ) -> Float[Array, "b l d"]:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class ClipEncoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, config: Any, *, causal: bool, compute: Compute, rngs: nnx.Rngs):
        count = config.num_hidden_layers
        self.layers = nnx.List(
            [ClipLayer(config, causal, compute=compute, rngs=rngs) for _ in range(count)]
        )

    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None = None
    ) -> Float[Array, "b l d"]:
        for layer in self.layers:
            x = layer(x, mask)
        return x
