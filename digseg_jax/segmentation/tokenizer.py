# SPDX-License-Identifier: Apache-2.0
"""Text to token ids of one static length.

Built on `tokenizers`, the Rust core of transformers' fast tokenizers: importing it takes
milliseconds where `transformers` takes seconds, and it needs no network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers.implementations import BertWordPieceTokenizer

from digseg_jax.errors import UserError


class Tokens(NamedTuple):
    """Token ids of n texts, padded to one length; the mask is True on real tokens."""

    ids: np.ndarray  # [n, l] int32
    mask: np.ndarray  # [n, l] bool


class Tokenizer:
    """Callable that tokenizes and pads, and refuses what would be cut."""

    def __init__(self, core: Any, pad_id: int = 0):
        core.no_truncation()  # tokenizer.json may carry its own; a cut prompt must be an error
        core.no_padding()
        self._core = core
        self.pad_id = pad_id

    @classmethod
    def from_json(cls, text: str, pad_id: int = 0) -> Tokenizer:
        """From the content of a tokenizer.json. Raises UserError if it is malformed."""
        try:
            return cls(tokenizers.Tokenizer.from_str(text), pad_id)
        except Exception as error:  # the Rust binding raises exactly this type
            raise UserError(f"not a tokenizer.json: {error}") from error

    @classmethod
    def from_vocab(
        cls, words: Sequence[str], settings: Mapping[str, Any] | None = None
    ) -> Tokenizer:
        """WordPiece from the lines of a BERT vocab.txt; `settings` is tokenizer_config.json."""
        settings = settings or {}
        vocab = {word: i for i, word in enumerate(words)}
        missing = [t for t in ("[UNK]", "[CLS]", "[SEP]", "[PAD]") if t not in vocab]
        if missing:
            raise UserError(f"not a BERT vocabulary: no {', '.join(missing)} in it")
        core = BertWordPieceTokenizer(
            vocab,
            lowercase=settings.get("do_lower_case", True),
            strip_accents=settings.get("strip_accents"),
            handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        )
        return cls(core, vocab["[PAD]"])

    def __call__(self, texts: Sequence[str], max_length: int) -> Tokens:
        """Tokenizes with special tokens and pads on the right to `max_length`.

        Raises:
            UserError: a text that is empty, blank, or longer than `max_length` tokens.
        """
        for i, text in enumerate(texts):
            if not text.strip():
                raise UserError(f"prompt {i} is empty: {text!r}")
        encodings = self._core.encode_batch(list(texts))
        ids = np.full((len(texts), max_length), self.pad_id, np.int32)
        for row, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
            count = len(encoding.ids)
            if count > max_length:
                raise UserError(
                    f"prompt {text!r} is {count} tokens long; at most {max_length} are legal"
                )
            ids[row, :count] = encoding.ids
        counts = np.array([len(e.ids) for e in encodings], np.int32)
        return Tokens(ids, np.arange(max_length)[None, :] < counts[:, None])
