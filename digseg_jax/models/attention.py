# SPDX-License-Identifier: Apache-2.0
"""Attention, with a choice of kernels, and the U-Net's transformer (diffusers: `attention.py`)."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from flax import nnx

from digseg_jax.arraytypes import Array, Bool, Float
from digseg_jax.models import remat
from digseg_jax.models.feed_forward import FeedForward
from digseg_jax.models.kernels.attention import IMPLEMENTATIONS, AttentionFn
from digseg_jax.models.layers import Compute, Conv, GroupNorm, Linear, Shared, layer_norm, linear


def attention(
    q: Float[Array, "b l heads d"],
    k: Float[Array, "b m heads d"],
    v: Float[Array, "b m heads d"],
    mask: Bool[Array, "b m"] | None = None,
    implementation: str | AttentionFn = "plain",
) -> Float[Array, "b l heads d"]:
    """Computes softmax attention with scale d**-0.5 and the softmax in float32.

    Every implementation gives the same result up to rounding.

    Args:
      mask: False where a key is padding. A row without any valid key attends to all keys evenly.
      implementation: "plain" | "chunked" (bounded memory, any platform) | "headwise" (CPU) | "splash"
        (TPU) | "cudnn" (GPU), see `models.kernels.attention`; or a function of (q, k, v, mask), such
        as one that knows how the arrays are sharded.

    Raises:
      ValueError: unknown implementation.
    """
    if callable(implementation):
        return implementation(q, k, v, mask)
    if implementation not in IMPLEMENTATIONS:
        legal = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"attention implementation {implementation!r}; legal: {legal}")
    return IMPLEMENTATIONS[implementation](q, k, v, mask)


class Attention(nnx.Module):
    """Multi-head attention: self-attention, or cross-attention if a `context` gives keys and values."""

    def __init__(
        self,
        features: int,
        context_features: int,
        heads: int,
        *,
        bias: bool = False,
        norm_groups: int | None = None,
        norm_eps: float = 1e-6,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        if norm_groups is not None:  # the VAE's attention normalizes its own input
            self.group_norm = GroupNorm(features, norm_groups, eps=norm_eps, compute=compute)

        # Attribute names are diffusers', so that a parameter path is the checkpoint's key.
        options: Shared = {"compute": compute, "rngs": rngs}
        self.to_q = linear(features, features, bias=bias, **options)
        self.to_k = linear(context_features, features, bias=bias, **options)
        self.to_v = linear(context_features, features, bias=bias, **options)

        # A list, because torch's second entry is a dropout, which has no parameters.
        self.to_out = nnx.List([linear(features, features, compute=compute, rngs=rngs)])
        self.heads, self.compute = heads, compute

    def __call__(
        self,
        x: Float[Array, "b l c"],
        context: Float[Array, "b m d"] | None = None,
        mask: Bool[Array, "b m"] | None = None,
    ) -> Float[Array, "b l c"]:
        if hasattr(self, "group_norm"):
            x = self.group_norm(x)
        source = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(source), self.to_v(source)

        # The projections of a text are small: keeping them is cheaper than projecting again.
        if context is not None:
            k, v = remat.kept(k), remat.kept(v)

        # Split the channels into heads, attend, and join them again.
        q, k, v = (a.reshape(*a.shape[:2], self.heads, -1) for a in (q, k, v))
        attend = partial(attention, implementation=self.compute.attention)
        y = remat.attention(attend, self.compute.remat)(q, k, v, mask)
        return self.to_out[0](y.reshape(x.shape))


class ParallelAttention(Attention):
    """Cross-attention to a prompt of its own, and beside it a second one to the text of the query.

    The first is a checkpoint's, which keeps reading the prompt that it knows. The second has
    projections and a scale of its own, after IP-Adapter (arXiv 2308.06721). While its output projection
    is zero, as at the start of training (`models.text_branch`), both compute what the first does alone.
    The prompt is a parameter and learns with the rest.

    Args:
      features, context_features, heads: of the first, as in `Attention`.
      prompt_length: tokens of its prompt, each `context_features` wide.
      text_features: width of the text's tokens.
    """

    def __init__(
        self,
        features: int,
        context_features: int,
        heads: int,
        *,
        prompt_length: int,
        text_features: int,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        super().__init__(features, context_features, heads, compute=compute, rngs=rngs)
        self.prompt = nnx.Embed(prompt_length, context_features, rngs=rngs)
        self.text = Attention(features, text_features, heads, compute=compute, rngs=rngs)
        self.scale = nnx.Param(jnp.ones((1,)))

    def __call__(
        self,
        x: Float[Array, "b l c"],
        context: Float[Array, "b m d"] | None = None,
        mask: Bool[Array, "b m"] | None = None,
    ) -> Float[Array, "b l c"]:
        # One prompt for all examples, repeated before it is projected: bit for bit, the products of a
        # network that gets the prompt as its text.
        prompt = self.compute.weights(self.prompt.embedding[...].astype(self.compute.dtype))
        own = super().__call__(x, jnp.broadcast_to(prompt, (x.shape[0], *prompt.shape)))
        return own + self.scale[...].astype(self.compute.dtype) * self.text(x, context, mask)


class BasicTransformerBlock(nnx.Module):
    """Transformer block: self-attention, cross-attention to the text, feed-forward; pre-norm.

    prompt_length: 0: one cross-attention, to the text; else a `ParallelAttention` with such a prompt.
    text_features: width of the text's tokens there.
    """

    def __init__(
        self,
        features: int,
        context_features: int,
        heads: int,
        *,
        prompt_length: int = 0,
        text_features: int = 0,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        options: Shared = {"compute": compute, "rngs": rngs}
        self.norm1 = layer_norm(features, **options)
        self.attn1 = Attention(features, features, heads, **options)

        # Cross-attention to the text, alone or beside one to a prompt of its own.
        self.norm2 = layer_norm(features, **options)
        if prompt_length:
            self.attn2: Attention = ParallelAttention(
                features,
                context_features,
                heads,
                prompt_length=prompt_length,
                text_features=text_features,
                **options,
            )
        else:
            self.attn2 = Attention(features, context_features, heads, **options)

        self.norm3 = layer_norm(features, **options)
        self.ff = FeedForward(features, **options)

    def __call__(
        self,
        x: Float[Array, "b l c"],
        context: Float[Array, "b m d"],
        mask: Bool[Array, "b m"] | None,
    ) -> Float[Array, "b l c"]:
        # The mask marks the text's tokens; among positions of the map there is no padding.
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """Transformer blocks over the positions of a feature map (diffusers: `transformer_2d.py`).

    prompt_length, text_features: of each block, see `BasicTransformerBlock`.
    """

    def __init__(
        self,
        features: int,
        context_features: int,
        heads: int,
        *,
        layers: int,
        groups: int,
        linear_projection: bool,
        prompt_length: int = 0,
        text_features: int = 0,
        compute: Compute,
        rngs: nnx.Rngs,
    ):
        options: Shared = {"compute": compute, "rngs": rngs}

        # Epsilon is 1e-6 here and 1e-5 in the U-Net's resnets, as in diffusers.
        self.norm = GroupNorm(features, groups, eps=1e-6, compute=compute)

        # Stable Diffusion 2.x has linear layers where 1.x has 1x1 convolutions.
        if linear_projection:
            self.proj_in: Linear | Conv = linear(features, features, **options)
            self.proj_out: Linear | Conv = linear(features, features, **options)
        else:
            self.proj_in = Conv(features, features, 1, **options)
            self.proj_out = Conv(features, features, 1, **options)

        self.compute = compute
        self.transformer_blocks = nnx.List(
            [
                BasicTransformerBlock(
                    features,
                    context_features,
                    heads,
                    prompt_length=prompt_length,
                    text_features=text_features,
                    **options,
                )
                for _ in range(layers)
            ]
        )

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        context: Float[Array, "b m d"],
        mask: Bool[Array, "b m"] | None,
    ) -> Float[Array, "b h w c"]:
        return remat.block(self._residual, self.compute.remat)(x, context, mask)

    def _residual(self, x: Array, context: Array, mask: Array | None) -> Array:
        """The map's positions as a sequence through all blocks, added to the map."""
        # Both kinds of projection act on the last axis, so the reshape may follow either.
        b, h, w, c = x.shape
        y = self.proj_in(self.norm(x)).reshape(b, h * w, c)
        for block in self.transformer_blocks:
            y = block(y, context, mask)
        return x + self.proj_out(y.reshape(b, h, w, c))
