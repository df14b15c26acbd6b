# SPDX-License-Identifier: Apache-2.0
"""CLIP's text encoder, numerically equal to `transformers.CLIPTextModel` at inference.

It covers ViT-L/14 (Stable Diffusion 1.x) and ViT-B/16 with quick-GELU, OpenCLIP's ViT-H/14 with the
exact GELU. Stable Diffusion 2.x conditions on the penultimate layer: its `text_encoder` comes without
the last of the 24 layers; `without_last_layers` does the same to a whole encoder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax.numpy as jnp
from flax import nnx

from digseg_jax.arraytypes import Array, Bool, DTypeLike, Float, Int
from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.models.hub_config import TRANSFORMERS_HARMLESS, HubConfig
from digseg_jax.models.layers import Compute, Shared, layer_norm, linear
from digseg_jax.models.text.clip import ClipEncoder, check_tower
from digseg_jax.models.text.output import TextOutput

# End token in configs from before transformers 4.31, which is wrong; the largest id marks the end then.
_WRONG_EOS = 2


@dataclasses.dataclass(frozen=True)
class ClipTextConfig(HubConfig):
    """Fields and defaults of transformers' `CLIPTextConfig`."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    CLASS_NAME: ClassVar[str] = "CLIPTextModel"
    HARMLESS: ClassVar = TRANSFORMERS_HARMLESS

    def __post_init__(self):
        check_tower(self.CLASS_NAME, self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds from an encoder's own `config.json` or that of a whole CLIPModel."""
        return super().from_dict(tower_values(values, "text_config"))

    def to_dict(self) -> dict[str, Any]:
        """The content of a `config.json` that transformers reads."""
        values = {k: v for k, v in super().to_dict().items() if k != "_class_name"}
        return {"architectures": [self.CLASS_NAME], "model_type": "clip_text_model", **values}


@dataclasses.dataclass(frozen=True)
class ClipTextProjectionConfig(ClipTextConfig):
    """Settings of the encoder with its projection into the space shared with images."""

    CLASS_NAME: ClassVar[str] = "CLIPTextModelWithProjection"


def tower_values(values: Mapping[str, Any], section: str) -> dict[str, Any]:
    """Selects one encoder's settings from a config.json, its own or a whole CLIPModel's.

    Args:
      values: the parsed file.
      section: the encoder's section in a CLIPModel's, "text_config" or "vision_config".
    """
    if not {"text_config", "vision_config"} & values.keys():
        return dict(values)

    # Old files have a second copy, `..._config_dict`, which takes precedence in transformers. The width
    # of the projection is written above the sections.
    own = {**(values.get(section) or {}), **(values.get(f"{section}_dict") or {})}
    width = values.get("projection_dim")
    return own if width is None else {**own, "projection_dim": width}


class ClipTextEmbeddings(nnx.Module):
    """Sum of token and position embeddings."""

    def __init__(self, config: ClipTextConfig, *, compute: Compute, rngs: nnx.Rngs):
        def embed(size: int) -> nnx.Embed:
            """A table of `size` vectors."""
            init = nnx.initializers.normal(0.02)
            return nnx.Embed(
                size, config.hidden_size, dtype=compute.dtype, embedding_init=init, rngs=rngs
            )

        self.token_embedding = embed(config.vocab_size)
        self.position_embedding = embed(config.max_position_embeddings)

    def __call__(self, input_ids: Int[Array, "b l"]) -> Float[Array, "b l d"]:
        positions = jnp.arange(input_ids.shape[1])
        return self.token_embedding(input_ids) + self.position_embedding(positions)


class CLIPTextModel(nnx.Module):
    """Token ids to token features; `pooled` is the normalized feature of the end-of-text token."""

    def __init__(self, config: ClipTextConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        options: Shared = {"compute": Compute(dtype), "rngs": rngs}
        self.config = config
        self.embeddings = ClipTextEmbeddings(config, **options)
        self.encoder = ClipEncoder(config, causal=True, **options)
        self.final_layer_norm = layer_norm(config.hidden_size, eps=config.layer_norm_eps, **options)

    def __call__(
        self,
        input_ids: Int[Array, "b l"],
        attention_mask: Bool[Array, "b l"] | Int[Array, "b l"] | None = None,
    ) -> TextOutput:
        """Encodes token ids.

        Attention is causal, so padding after a text changes none of its tokens.

        Args:
            input_ids: padded token ids.
            attention_mask: nonzero where a token is attended to; None: everywhere.

        Raises:
            UserError: l exceeds `config.max_position_embeddings`.
        """
        if input_ids.shape[1] > self.config.max_position_embeddings:
            raise UserError(
                f"CLIP text has {input_ids.shape[1]} tokens; the model has positions for "
                f"{self.config.max_position_embeddings}"
            )

        mask = None if attention_mask is None else attention_mask.astype(bool)
        x = self.final_layer_norm(self.encoder(self.embeddings(input_ids), mask))

        # The end token has seen the whole text.
        end = _end_of_text(input_ids, self.config.eos_token_id)
        return TextOutput(x, x[jnp.arange(x.shape[0]), end])


class CLIPTextModelWithProjection(nnx.Module):
    """`CLIPTextModel` whose `pooled` is projected to the space of image features, not normalized."""

    def __init__(
        self, config: ClipTextProjectionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32
    ):
        self.config = config
        self.text_model = CLIPTextModel(config, rngs=rngs, dtype=dtype)
        self.text_projection = linear(
            config.hidden_size, config.projection_dim, bias=False, compute=Compute(dtype), rngs=rngs
        )

    def __call__(
        self,
        input_ids: Int[Array, "b l"],
        attention_mask: Bool[Array, "b l"] | Int[Array, "b l"] | None = None,
    ) -> TextOutput:
        """Encodes as `CLIPTextModel` does, with `pooled` projected to [b, projection_dim]."""
        out = self.text_model(input_ids, attention_mask)
        return TextOutput(out.last_hidden_state, self.text_projection(out.pooled))


def without_last_layers(model: CLIPTextModel, count: int) -> CLIPTextModel:
    """Returns the encoder without its last `count` layers: same final norm, same arrays.

    Raises:
        UserError: fewer than one layer would remain.
    """
    layers = model.config.num_hidden_layers - count
    if not 1 <= layers <= model.config.num_hidden_layers:
        raise UserError(
            f"cannot drop {count} of {model.config.num_hidden_layers} text layers; "
            f"legal: 0 to {model.config.num_hidden_layers - 1}"
        )

    # The structure of the shorter encoder, filled with the arrays of the longer one.
    config = dataclasses.replace(model.config, num_hidden_layers=layers)
    dtype = model.embeddings.token_embedding.dtype
    graphdef, _ = functional.abstract(
        lambda: CLIPTextModel(config, rngs=functional.FixedRngs(), dtype=dtype)
    )

    params = functional.split(model)[1]
    kept = {str(i): params["encoder"]["layers"][str(i)] for i in range(layers)}
    return functional.merge(graphdef, {**params, "encoder": {"layers": kept}})


def _end_of_text(input_ids: Int[Array, "b l"], eos_token_id: int) -> Int[Array, "b"]:
    """Position of each text's end token."""
    if eos_token_id == _WRONG_EOS:
        return jnp.argmax(input_ids, axis=-1)
    return jnp.argmax(input_ids == eos_token_id, axis=-1)  # the first: padding may repeat it
