# SPDX-License-Identifier: Apache-2.0
"""BERT encoder, numerically equal to `transformers.BertModel` at inference.

Post-layer-norm, learned absolute positions, token types, exact (erf) GELU. Attributes are named as in
transformers, so a parameter path is the checkpoint key. There is no dropout: the encoder is frozen
wherever this project uses it.

Source: Devlin et al., "BERT", arXiv:1810.04805; transformers `models/bert/modeling_bert.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from digseg_jax.arraytypes import Array, Bool, DTypeLike, Float, Int
from digseg_jax.errors import UserError
from digseg_jax.models.attention import attention
from digseg_jax.models.hub_config import TRANSFORMERS_HARMLESS, HubConfig
from digseg_jax.models.text.output import TextOutput


@dataclasses.dataclass(frozen=True)
class BertConfig(HubConfig):
    """Fields of the hub's config.json, and `add_pooling_layer`, which loading infers from the keys."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int = 0
    add_pooling_layer: bool = True

    CLASS_NAME: ClassVar[str] = "BertModel"
    REQUIRED_VALUES: ClassVar = {
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
    }
    HARMLESS: ClassVar = TRANSFORMERS_HARMLESS

    def __post_init__(self):
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"BertModel config: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The content of a `config.json` that transformers reads."""
        values = {k: v for k, v in super().to_dict().items() if k != "_class_name"}
        return {"architectures": [self.CLASS_NAME], "model_type": "bert", **values}


class BertEmbeddings(nnx.Module):
    """Sum of word, position and token type embeddings, normalized."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        def embed(size: int) -> nnx.Embed:
            """A table of `size` vectors."""
            init = nnx.initializers.normal(config.initializer_range)
            return nnx.Embed(size, config.hidden_size, dtype=dtype, embedding_init=init, rngs=rngs)

        self.pad_token_id = config.pad_token_id
        self.word_embeddings = embed(config.vocab_size)
        self.position_embeddings = embed(config.max_position_embeddings)
        self.token_type_embeddings = embed(config.type_vocab_size)
        self.LayerNorm = _layer_norm(config, rngs, dtype)

    def __call__(self, input_ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        positions = jnp.arange(input_ids.shape[1])

        # torch never trains the padding token's row.
        x = self.word_embeddings(input_ids)
        padding = (input_ids == self.pad_token_id)[..., None]
        x = jnp.where(padding, jax.lax.stop_gradient(x), x)

        # A prompt is a single sentence: all its tokens have type 0.
        x = x + self.token_type_embeddings(jnp.zeros_like(input_ids))
        return self.LayerNorm(x + self.position_embeddings(positions))


class BertSelfAttention(nnx.Module):
    """Multi-head attention without the output projection; softmax in float32."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        d = config.hidden_size
        self.heads = config.num_attention_heads
        self.query = _linear(d, d, config, rngs, dtype)
        self.key = _linear(d, d, config, rngs, dtype)
        self.value = _linear(d, d, config, rngs, dtype)

    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None
    ) -> Float[Array, "b l d"]:
        # Split the channels into heads, attend, and join them again.
        b, length, d = x.shape
        split = (b, length, self.heads, d // self.heads)
        q, k, v = (f(x).reshape(split) for f in (self.query, self.key, self.value))
        return attention(q, k, v, mask).reshape(b, length, d)


class BertResidualOutput(nnx.Module):
    """LayerNorm(dense(x) + residual), the end of both the attention and the feed-forward half."""

    def __init__(self, inputs: int, config: BertConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.dense = _linear(inputs, config.hidden_size, config, rngs, dtype)
        self.LayerNorm = _layer_norm(config, rngs, dtype)

    def __call__(
        self, x: Float[Array, "b l c"], residual: Float[Array, "b l d"]
    ) -> Float[Array, "b l d"]:
        return self.LayerNorm(self.dense(x) + residual)


class BertAttention(nnx.Module):
    """Self-attention with its residual output."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.self = BertSelfAttention(config, rngs=rngs, dtype=dtype)
        self.output = BertResidualOutput(config.hidden_size, config, rngs=rngs, dtype=dtype)

    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None
    ) -> Float[Array, "b l d"]:
        return self.output(self.self(x, mask), x)


class BertDense(nnx.Module):
    """One linear layer under the name `dense`: transformers' intermediate layer and pooler."""

    def __init__(self, outputs: int, config: BertConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.dense = _linear(config.hidden_size, outputs, config, rngs, dtype)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b c"]:
        return self.dense(x)


class BertLayer(nnx.Module):
    """One layer: attention, then feed-forward."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        inner = config.intermediate_size
        self.attention = BertAttention(config, rngs=rngs, dtype=dtype)
        self.intermediate = BertDense(inner, config, rngs=rngs, dtype=dtype)
        self.output = BertResidualOutput(inner, config, rngs=rngs, dtype=dtype)

    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None
    ) -> Float[Array, "b l d"]:
        x = self.attention(x, mask)
        return self.output(jax.nn.gelu(self.intermediate(x), approximate=False), x)


class BertEncoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        layers = range(config.num_hidden_layers)
        self.layer = nnx.List([BertLayer(config, rngs=rngs, dtype=dtype) for _ in layers])

    def __call__(
        self, x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None
    ) -> Float[Array, "b l d"]:
        for layer in self.layer:
            x = layer(x, mask)
        return x


class BertModel(nnx.Module):
    """BERT text encoder.

    `pooled` is tanh(dense(first token)) when the checkpoint has a pooler
    (`config.add_pooling_layer`), else the mean of the tokens under the mask, which is the sentence
    vector of sentence-transformers before normalization.
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.config = config
        self.embeddings = BertEmbeddings(config, rngs=rngs, dtype=dtype)
        self.encoder = BertEncoder(config, rngs=rngs, dtype=dtype)
        if config.add_pooling_layer:
            self.pooler = BertDense(config.hidden_size, config, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        input_ids: Int[Array, "b l"],
        attention_mask: Bool[Array, "b l"] | Int[Array, "b l"] | None = None,
    ) -> TextOutput:
        """Encodes token ids.

        Args:
            input_ids: padded token ids.
            attention_mask: nonzero where a token is attended to; None: everywhere.

        Raises:
            UserError: l exceeds `config.max_position_embeddings`.
        """
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise UserError(
                f"BERT input has {input_ids.shape[1]} tokens; the model has positions for "
                f"{self.config.max_position_embeddings}"
            )

        # With a pooler the first token stands for the text, else the mean of all of them.
        mask = None if attention_mask is None else attention_mask.astype(bool)
        x = self.encoder(self.embeddings(input_ids), mask)
        if self.config.add_pooling_layer:
            return TextOutput(x, jnp.tanh(self.pooler(x[:, 0])))
        return TextOutput(x, masked_mean(x, mask))


def masked_mean(x: Float[Array, "b l d"], mask: Bool[Array, "b l"] | None) -> Float[Array, "b d"]:
    """Averages the tokens that the mask marks (all if None); zero where it marks none."""
    if mask is None:
        return x.mean(axis=1)
    weights = mask[..., None].astype(x.dtype)
    return (x * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1)


def _linear(
    inputs: int, outputs: int, config: BertConfig, rngs: nnx.Rngs, dtype: DTypeLike
) -> nnx.Linear:
    """A linear layer with BERT's initial weights."""
    init = nnx.initializers.normal(config.initializer_range)
    return nnx.Linear(inputs, outputs, dtype=dtype, kernel_init=init, rngs=rngs)


def _layer_norm(config: BertConfig, rngs: nnx.Rngs, dtype: DTypeLike) -> nnx.LayerNorm:
    """Layer normalization over the width of a token."""
    # The fast variance, E[x^2] - E[x]^2, loses digits where eps is only 1e-12.
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_eps,
        dtype=dtype,
        use_fast_variance=False,
        rngs=rngs,
    )
