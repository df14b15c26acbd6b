# SPDX-License-Identifier: Apache-2.0
"""Converts texts to token ids of one static length.

Built on `tokenizers`, the Rust core of transformers' fast tokenizers: importing it takes
milliseconds where `transformers` takes seconds, and it needs no network. Only CLIP's vocabulary
without a tokenizer.json goes through `transformers`, which knows how CLIP splits text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers.implementations import BertWordPieceTokenizer

from digseg_jax.errors import UserError

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_MERGES = 49152 - 256 - 2  # number of lines of its BPE file that CLIP uses


class Tokens(NamedTuple):
    """Token ids of n texts, padded to one length; the mask is True on real tokens."""

    ids: np.ndarray  # [n, l] int32
    mask: np.ndarray  # [n, l] bool


class Tokenizer:
    """Tokenizes and pads texts; rejects a text that would be cut."""

    def __init__(self, core: Any, pad_id: int = 0):
        core.no_truncation()  # tokenizer.json may carry its own; a cut prompt must be an error
        core.no_padding()
        self._core = core
        self.pad_id = pad_id

    @classmethod
    def from_json(cls, text: str, pad_token: str | None = None) -> Tokenizer:
        """Builds from the content of a tokenizer.json; pads with `pad_token`, else as `_pad_id` says.

        Raises:
            UserError: it is malformed, or lacks the padding token.
        """
        try:
            core = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the Rust binding raises exactly this type
            raise UserError(f"not a tokenizer.json: {error}") from error
        return cls(core, _pad_id(core, pad_token))

    @classmethod
    def from_vocab(cls, words: Sequence[str], settings: Mapping[str, Any] | None = None) -> Tokenizer:
        """Builds WordPiece from the lines of a BERT vocab.txt; `settings` is tokenizer_config.json.

        Raises:
            UserError: one of BERT's four special tokens is missing.
        """
        settings = settings or {}
        vocab = {word: i for i, word in enumerate(words)}
        missing = [t for t in ("[UNK]", "[CLS]", "[SEP]", "[PAD]") if t not in vocab]
        if missing:
            raise UserError(f"not a BERT vocabulary: no {', '.join(missing)} in it")

        # The defaults are those of transformers' BertTokenizer.
        core = BertWordPieceTokenizer(
            vocab,
            lowercase=settings.get("do_lower_case", True),
            strip_accents=settings.get("strip_accents"),
            handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        )
        return cls(core, vocab["[PAD]"])

    @classmethod
    def from_clip(
        cls, vocab: Mapping[str, int], merges: Sequence[str], pad_token: str | None = None
    ) -> Tokenizer:
        """Builds byte-level BPE from CLIP's vocab.json and the lines of its merges.txt, such as "i n".

        Raises:
            UserError: the vocabulary lacks CLIP's two special tokens, or the merges do not fit it.
        """
        missing = [t for t in (CLIP_START, CLIP_END) if t not in vocab]
        if missing:
            raise UserError(f"not a CLIP vocabulary: no {', '.join(missing)} in it")
        from transformers import CLIPTokenizer  # seconds; see the module's docstring

        pairs = [tuple(line.split()) for line in merges]
        try:
            # Its annotation lacks the pairs that it accepts, hence the ignored type.
            core = CLIPTokenizer(vocab=dict(vocab), merges=pairs).backend_tokenizer  # type: ignore[arg-type]
        except Exception as error:  # the Rust binding raises exactly this type
            raise UserError(f"not a CLIP vocabulary: {error}") from error
        return cls(core, _pad_id(core, pad_token))

    @classmethod
    def from_clip_bpe(cls, lines: Sequence[str], pad_token: str | None = None) -> Tokenizer:
        """Builds from the lines of OpenAI's and open_clip's `bpe_simple_vocab_16e6.txt`."""
        merges = list(lines[1 : CLIP_MERGES + 1])  # the first line is a comment
        if len(merges) < CLIP_MERGES:
            raise UserError(f"not CLIP's BPE file: {len(merges)} merges, expected {CLIP_MERGES}")

        # The vocabulary in CLIP's order: bytes, bytes that end a word, merges, special tokens.
        letters = _byte_letters()
        words = ["".join(line.split()) for line in merges]
        entries = [*letters, *(x + "</w>" for x in letters), *words, CLIP_START, CLIP_END]
        return cls.from_clip({e: i for i, e in enumerate(entries)}, merges, pad_token)

    def __call__(self, texts: Sequence[str], max_length: int) -> Tokens:
        """Tokenizes with special tokens and pads on the right to `max_length`.

        Raises:
            UserError: a text that is empty, blank, or longer than `max_length` tokens.
        """
        # An empty query asks for nothing.
        for i, text in enumerate(texts):
            if not text.strip():
                raise UserError(f"prompt {i} is empty: {text!r}")
        return self.padded(texts, max_length)

    def padded(self, texts: Sequence[str], max_length: int) -> Tokens:
        """Tokenizes and pads texts that may be empty.

        Raises:
            UserError: a text that is longer than `max_length` tokens.
        """
        # Rows start as padding, and each text fills the beginning of its row.
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

    def unknown(self, texts: Sequence[str]) -> list[str]:
        """Words for which the vocabulary has no token, each once: BERT's lacks some, CLIP's none."""
        missing = self._core.token_to_id("[UNK]")
        found: dict[str, None] = {}
        for text, encoding in zip(texts, self._core.encode_batch(list(texts)), strict=True):
            for number, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if number == missing and missing is not None:
                    found[text[start:end]] = None
        return list(found)

    def to_json(self) -> str:
        """The content of a tokenizer.json, which transformers reads; without `pad_token`."""
        return self._core.to_str()

    @property
    def pad_token(self) -> str:
        """The token of `pad_id`."""
        return self._core.id_to_token(self.pad_id)


def _pad_id(core: tokenizers.Tokenizer, pad_token: str | None) -> int:
    """Id of `pad_token` if given, else of BERT's, else of CLIP's own (Stable Diffusion 1.x), else 0.

    Stable Diffusion 2.x names "!" (id 0) in the settings beside its tokenizer.

    Raises:
        UserError: the given token is not in the vocabulary.
    """
    if pad_token is not None and core.token_to_id(pad_token) is None:
        raise UserError(f"the padding token {pad_token!r} is not in the vocabulary")
    names = [pad_token] if pad_token is not None else ["[PAD]", CLIP_END]
    return next((i for i in map(core.token_to_id, names) if i is not None), 0)


def _byte_letters() -> list[str]:
    """A printable letter for each byte, in the order of CLIP's vocabulary.

    Bytes that print in Latin-1 stand for themselves; the others take letters from 256 on.
    """
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
