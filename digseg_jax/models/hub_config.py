# SPDX-License-Identifier: Apache-2.0
"""Base class of the model configs: converts a hub's `config.json` to a frozen dataclass and back.

Anyone may have written such a file, and its settings are meant for another program. It is checked as a
whole before anything is built: a setting that could change the numbers and that this port does not know
is rejected by name, and so are sizes that no model of this kind has.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from digseg_jax.errors import UserError

MOST_LAYERS = 64  # of a level or a tower; the largest CLIP has 48
MOST_LEVELS = 8  # entries of a list
LARGEST = 2**20  # any other number: widths, vocabularies, image sizes
# other whole numbers begin at 1
_FROM_ZERO = ("freq_shift", "pad_token_id", "eos_token_id", "prompt_length", "mark_width")

# Settings that every class of transformers writes and that concern generating text, training, other
# heads or the form of the output.
TRANSFORMERS_HARMLESS = frozenset({
    "add_cross_attention", "architectures", "attention_dropout", "attention_probs_dropout_prob",
    "attn_implementation", "bad_words_ids", "begin_suppress_tokens", "bos_token_id",
    "chunk_size_feed_forward", "classifier_dropout", "cross_attention_hidden_size",
    "decoder_start_token_id", "directionality", "diversity_penalty", "do_sample", "dropout",
    "dtype", "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "gradient_checkpointing", "hidden_dropout_prob", "id2label",
    "initializer_factor", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id",
    "length_penalty", "logit_scale_init_value", "max_length", "min_length", "model_type",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
    "output_attentions", "output_hidden_states", "output_past", "output_scores", "pad_token_id",
    "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head",
    "pooler_type", "prefix", "problem_type", "projection_dim", "remove_invalid_values",
    "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss",
    "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p",
    "torch_dtype", "torchscript", "transformers_version", "typical_p", "use_bfloat16", "use_cache",
})  # fmt: skip


def _tuples(value: Any) -> Any:
    """The value with tuples for lists, at any depth: a frozen dataclass must be hashable."""
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


@dataclasses.dataclass(frozen=True)
class HubConfig:
    """Base of the configs, whose fields are named as in `config.json`.

    Attributes:
      CLASS_NAME: the model's class in diffusers or transformers.
      REQUIRED_VALUES: settings of which this port implements one value only.
      HARMLESS: settings that change no number here, whatever their value.
    """

    CLASS_NAME: ClassVar[str] = ""
    REQUIRED_VALUES: ClassVar[Mapping[str, Any]] = {}
    HARMLESS: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds the config from a parsed `config.json`.

        Raises:
          UserError: a setting that this port does not implement or does not know, a value of another
            type, or a size out of bounds.
        """
        hints = typing.get_type_hints(cls)
        fields: dict[str, Any] = {}
        for key, given in values.items():
            value = _tuples(given)
            if key in cls.REQUIRED_VALUES:
                cls._check_required(key, value)
            elif key not in hints:
                cls._check_unknown(key, value)
            elif value is not None or _fits(key, None, hints[key]):  # null elsewhere: the default
                cls._check_field(key, value, hints[key])
                fields[key] = value
        return cls(**fields)

    @classmethod
    def _check_required(cls, key: str, value: Any) -> None:
        """Raises UserError for a value of REQUIRED_VALUES that is not the implemented one."""
        # Some files write null for "off" where others write false.
        legal = cls.REQUIRED_VALUES[key]
        if value not in ((legal, None) if legal is False else (legal,)):
            raise UserError(
                f"{cls.CLASS_NAME} config: {key}={value!r} is not supported; legal: {legal!r}"
            )

    @classmethod
    def _check_unknown(cls, key: str, value: Any) -> None:
        """Raises UserError for a setting that is not known to be harmless and has a value."""
        # Names with an underscore first are notes of the libraries, such as versions and paths.
        if key.startswith("_") or key in cls.HARMLESS or value is None or value in ((), {}, ""):
            return
        raise UserError(
            f"{cls.CLASS_NAME} config: {key}={repr(value)[:60]} is unknown, and may change the "
            "numbers; weights that need it are not supported"
        )

    @classmethod
    def _check_field(cls, key: str, value: Any, hint: Any) -> None:
        """Raises UserError for a value of another type than the field's, or out of bounds."""
        if not _fits(key, value, hint):
            raise UserError(
                f"{cls.CLASS_NAME} config: {key}={repr(value)[:60]}; legal: {_legal(key, hint)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The content of a `config.json` that diffusers or transformers reads."""
        # JSON has no tuples. Required values are written too: readers may have other defaults.
        values = dataclasses.asdict(self)
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {"_class_name": self.CLASS_NAME, **self.REQUIRED_VALUES, **values}


def _fits(key: str, value: Any, hint: Any) -> bool:
    """Whether a value of a `config.json` has the type of a field, and a legal size."""
    if isinstance(hint, types.UnionType):
        return any(_fits(key, value, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        legal = isinstance(value, tuple) and 0 < len(value) <= MOST_LEVELS
        return legal and all(_fits(key, v, item) for v in value)

    # Python's bool is an int, but true is not a number in JSON.
    if hint is int:
        return type(value) is int and _least(key) <= value <= _most(key)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is hint


def _least(key: str) -> int:
    return 0 if key in _FROM_ZERO else 1


def _most(key: str) -> int:
    """The largest value of a whole number."""
    return MOST_LAYERS if "layers" in key or key.startswith(("num_encoder", "num_decoder")) else LARGEST


def _legal(key: str, hint: Any) -> str:
    """Says in words what a field takes."""
    if isinstance(hint, types.UnionType):
        return " or ".join(_legal(key, part) for part in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"1 to {MOST_LEVELS} of: {_legal(key, typing.get_args(hint)[0])}"
    if hint is int:
        return f"one number, {_least(key)} to {_most(key)}"
    return {float: "a number", bool: "true or false", str: "a text"}.get(hint, "null")


def check_groups(name: str, widths: tuple[int, ...], groups: int) -> None:
    """Raises UserError unless there is a level, and the groups of the norms divide all channels."""
    if not widths:
        raise UserError(f"{name} config: block_out_channels=(); legal: a number for each level")
    for width in widths:
        if width % groups:
            raise UserError(
                f"{name} config: block_out_channels={widths!r}; legal: multiples of "
                f"norm_num_groups={groups}"
            )
