# SPDX-License-Identifier: Apache-2.0
"""The BERT text encoder of an open_clip checkpoint, such as BiomedCLIP's PubMedBERT, with projection.

It is numerically equal to open_clip's `HFTextEncoder` (`hf_model.py`), and has its name and keys.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx

from digseg_jax.arraytypes import Array, Bool, DTypeLike, Float, Int
from digseg_jax.errors import UserError
from digseg_jax.io.json_file import check_keys
from digseg_jax.models.layers import Compute, Linear, Shared, linear
from digseg_jax.models.text.bert import BertConfig, BertModel, masked_mean
from digseg_jax.models.text.output import TextOutput

HEAD_WIDTH = 64  # channels of a head in every BERT of base and large size; open_clip's config lacks it
WIDTHS = (768, 1024)  # those sizes; a MiniLM, say, has heads of another width
ROBERTA_POSITIONS = 514  # 512, and two for the padding, where RoBERTa's positions begin
POOLERS = ("cls_last_hidden_state_pooler", "cls_pooler", "mean_pooler")
PROJECTIONS = ("mlp", "linear")
_DEFAULTS = {"hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler"}  # open_clip's
_OLD_NAMES = {"proj": "hf_proj_type", "pooler_type": "hf_pooler_type"}  # of open_clip's first files
_TEXT_KEYS = (
    "hf_model_name", "hf_tokenizer_name", "hf_proj_type", "hf_pooler_type", "hf_model_pretrained",
    "context_length", "heads",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OpenClipTextConfig:
    """Config of the text encoder, from open_clip_config.json and the stored shapes.

    open_clip_config.json names a BERT on the hub instead of describing it, so sizes come from the
    shapes; heads are 64 wide, unless the file states their number.

    Attributes:
      bert: the encoder without its projection.
      embed_dim: channels of the space shared with images.
      projection: one of PROJECTIONS.
      pooler: one of POOLERS.
      context_length: most tokens of a text in training.
      hf_model_name: the BERT's id on the hub.
    """

    bert: BertConfig
    embed_dim: int
    projection: str
    pooler: str
    context_length: int
    hf_model_name: str

    CLASS_NAME: ClassVar[str] = "HFTextEncoder"

    @classmethod
    def from_checkpoint(cls, values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Self:
        """Builds from a parsed open_clip_config.json and the stored shape of every key.

        Raises:
            UserError: a setting that is missing, not implemented or not known, or no BERT under
              `text.transformer.`.
        """
        model, given = values["model_cfg"], values["model_cfg"]["text_cfg"]
        text = _DEFAULTS | {_OLD_NAMES.get(key, key): value for key, value in given.items()}
        _check(text, "hf_pooler_type", POOLERS)
        _check(text, "hf_proj_type", PROJECTIONS)
        _check_types({**model, "text_cfg": text})

        pooler, bert = text["hf_pooler_type"], _bert_config(shapes, text)
        return cls(
            bert=dataclasses.replace(bert, add_pooling_layer=pooler == "cls_pooler"),
            embed_dim=model["embed_dim"],
            projection=text["hf_proj_type"],
            pooler=pooler,
            context_length=text.get("context_length", 77),  # open_clip's default
            hf_model_name=text["hf_model_name"],
        )

    @property
    def hidden_size(self) -> int:
        """Channels of a token."""
        return self.bert.hidden_size

    @property
    def max_position_embeddings(self) -> int:
        """Most tokens of a text: as in training, but no more than there are positions."""
        return min(self.context_length, self.bert.max_position_embeddings)

    def to_dict(self) -> dict[str, Any]:
        """The text part of an open_clip_config.json."""
        text = {
            "hf_model_name": self.hf_model_name,
            "hf_tokenizer_name": self.hf_model_name,
            "hf_proj_type": self.projection,
            "hf_pooler_type": self.pooler,
            "context_length": self.context_length,
        }
        if self.hidden_size not in WIDTHS:  # a reader could not tell them from the width
            text["heads"] = self.bert.num_attention_heads
        return {"model_cfg": {"embed_dim": self.embed_dim, "text_cfg": text}}


class HFTextEncoder(nnx.Module):
    """BERT, a pooled token, and its projection into the space shared with images.

    The two layers of the "mlp" projection are `width -> (width + embed_dim) / 2 -> embed_dim`
    without bias, with the exact GELU between.
    """

    def __init__(self, config: OpenClipTextConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32):
        self.config = config
        self.transformer = BertModel(config.bert, rngs=rngs, dtype=dtype)
        options: Shared = {"compute": Compute(dtype), "rngs": rngs}

        # Index 1 of the "mlp" is torch's GELU, which has no parameters.
        width, out = config.hidden_size, config.embed_dim
        if config.projection == "linear":
            self.proj: Linear | nnx.List[Any] = linear(width, out, bias=False, **options)
        else:
            inner = (width + out) // 2
            self.proj = nnx.List(
                [
                    linear(width, inner, bias=False, **options),
                    nnx.Module(),
                    linear(inner, out, bias=False, **options),
                ]
            )

    def __call__(
        self,
        input_ids: Int[Array, "b l"],
        attention_mask: Bool[Array, "b l"] | Int[Array, "b l"] | None = None,
    ) -> TextOutput:
        """Encodes as `BertModel` does, with `pooled` projected to [b, embed_dim], not normalized.

        open_clip itself masks the tokens equal to `[PAD]`; pass `input_ids != 0` for the same.
        """
        out = self.transformer(input_ids, attention_mask)
        return TextOutput(out.last_hidden_state, self._project(self._pool(out, attention_mask)))

    def _pool(self, out: TextOutput, mask: Array | None) -> Float[Array, "b d"]:
        """One vector per text, by the checkpoint's own pooling."""
        if self.config.pooler == "cls_pooler":
            return out.pooled
        if self.config.pooler == "mean_pooler":
            return masked_mean(out.last_hidden_state, None if mask is None else mask.astype(bool))
        return out.last_hidden_state[:, 0]

    def _project(self, x: Float[Array, "b d"]) -> Float[Array, "b e"]:
        """Projects pooled vectors into the space shared with images."""
        if isinstance(self.proj, Linear):
            return self.proj(x)
        return self.proj[2](jax.nn.gelu(self.proj[0](x), approximate=False))


def _check_types(model: Mapping[str, Any]) -> None:
    """Raises UserError for a text encoder's setting that is missing, unknown or of another type."""
    try:
        check_keys(model, {"embed_dim": int})
        check_keys(model["text_cfg"], {"hf_model_name": str})
        sizes = [key for key in ("context_length", "heads") if key in model["text_cfg"]]
        check_keys(model["text_cfg"], dict.fromkeys(sizes, int))
    except ValueError as error:
        raise UserError(f"open_clip_config.json: {error}") from error

    unknown = [k for k, v in model["text_cfg"].items() if k not in _TEXT_KEYS and v is not None]
    if unknown:
        raise UserError(
            f"open_clip_config.json: {unknown[0]}={str(model['text_cfg'][unknown[0]])[:60]!r} is not "
            "known here, and may change the numbers; weights that need it are not supported"
        )


def _check(text: Mapping[str, Any], key: str, legal: tuple[str, ...]) -> None:
    """Raises UserError unless a setting has one of the legal values."""
    if text.get(key) not in legal:
        raise UserError(
            f"open_clip_config.json: {key}={text.get(key)!r} is not supported; "
            f"legal: {', '.join(legal)}"
        )


def _bert_config(shapes: Mapping[str, tuple[int, ...]], text: Mapping[str, Any]) -> BertConfig:
    """Infers the sizes of the text encoder from the stored shapes: open_clip's config has none.

    text: the config's `text_cfg`.

    Raises:
        UserError: a key of a BERT is missing, it is a RoBERTa, or its heads are not known.
    """
    prefix = "text.transformer."
    try:
        vocab, width = shapes[f"{prefix}embeddings.word_embeddings.weight"]
        positions = shapes[f"{prefix}embeddings.position_embeddings.weight"][0]
        types = shapes[f"{prefix}embeddings.token_type_embeddings.weight"][0]
        inner = shapes[f"{prefix}encoder.layer.0.intermediate.dense.weight"][0]
    except KeyError as error:
        raise UserError(
            f"open_clip checkpoint without a BERT text tower: no key {error.args[0]!r}"
        ) from error
    _check_no_roberta(text["hf_model_name"], positions, types)

    # Layers are counted by their keys; the heads follow from their width.
    layer = re.compile(re.escape(prefix) + r"encoder\.layer\.(\d+)\.")
    numbers = [int(m[1]) for m in map(layer.match, shapes) if m]

    return BertConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=max(numbers) + 1,
        num_attention_heads=_heads(text, width),
        intermediate_size=inner,
        max_position_embeddings=positions,
        type_vocab_size=types,
    )


def _check_no_roberta(name: str, positions: int, types: int) -> None:
    """Raises UserError for a tower with BERT's keys that computes something else.

    RoBERTa and XLM-R number positions from 2 on, pad with 1, and have another epsilon in their norms.
    """
    if "roberta" in name.lower() or positions == ROBERTA_POSITIONS or types != 2:
        raise UserError(
            f"open_clip_config.json: hf_model_name={name!r} is no BERT ({positions} positions, {types} "
            "token types; a RoBERTa has 514 and 1); legal: BERTs, which have 2 token types"
        )


def _heads(text: Mapping[str, Any], width: int) -> int:
    """The number of heads: the config's, else as many as BERTs of a usual width have.

    Raises:
        UserError: another width without their number, or a number that no BERT of that width has.
    """
    usual, heads = width // HEAD_WIDTH, text.get("heads")
    if width in WIDTHS and heads in (None, usual):
        return usual
    if width in WIDTHS or heads is None or heads < 1 or width % heads:
        legal = f"{usual}" if width in WIDTHS else f"a divisor of {width}"
        raise UserError(
            f"open_clip_config.json: text_cfg.heads={heads}: the number of heads of {width} channels "
            f"is not known; legal: {legal}, as in the config.json of {text['hf_model_name']!r}"
        )
    return heads
