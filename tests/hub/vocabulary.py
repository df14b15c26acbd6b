# SPDX-License-Identifier: Apache-2.0
"""Tokenizer files of CLIP and PubMedBERT: real formats, sizes and special ids, made-up pieces.

The real vocabularies cannot be generated. These hold as many entries, so that the start and the end of
a text are 49406 and 49407; words fall apart into pieces of at most four letters.
"""

from __future__ import annotations

import functools
import itertools
import json
import string
from pathlib import Path
from typing import Any

from digseg_jax.models.text.tokenizer import CLIP_END, CLIP_MERGES, CLIP_START, _byte_letters

BERT_SIZE = 30522
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # PubMedBERT's order
_LETTERS = string.ascii_lowercase
_WORD_END = "</w>"


def write_clip(folder: Path, pad_token: str, *, fast: bool = False) -> None:
    """Writes the files of a `tokenizer` folder.

    pad_token: CLIP_END in Stable Diffusion 1.x, "!" in 2.x.
    fast: writes tokenizer.json too, as OpenAI's repositories have it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges, tokenizer = _clip_files()
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    if fast:
        (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")

    def added(content: str) -> dict[str, Any]:
        return {
            "content": content,
            "lstrip": False,
            "normalized": True,
            "rstrip": False,
            "single_word": False,
        }

    special = {"bos_token": added(CLIP_START), "eos_token": added(CLIP_END), "pad_token": pad_token}
    _write(folder / "special_tokens_map.json", special | {"unk_token": added(CLIP_END)})
    settings = {
        "add_prefix_space": False,
        "bos_token": {"__type": "AddedToken"} | added(CLIP_START),
        "do_lower_case": True,
        "eos_token": {"__type": "AddedToken"} | added(CLIP_END),
        "errors": "replace",
        "model_max_length": 77,
        # the class default, whatever the tokenizer pads with
        "pad_token": CLIP_END,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": {"__type": "AddedToken"} | added(CLIP_END),
    }
    _write(folder / "tokenizer_config.json", settings)


def write_bert(folder: Path) -> None:
    """Writes vocab.txt and the settings beside it; the pad token is [PAD], id 0."""
    folder.mkdir(parents=True, exist_ok=True)
    single = [c for c in map(chr, range(33, 127)) if not c.isupper()]
    pieces = itertools.chain(
        single,
        (f"##{c}" for c in single),
        (f"##{a}{b}" for a, b in itertools.product(_LETTERS, repeat=2)),
        ("".join(p) for p in itertools.product(_LETTERS, repeat=2)),
        ("".join(p) for p in itertools.product(_LETTERS, repeat=3)),
        (f"##{a}{b}{c}" for a, b, c in itertools.product(_LETTERS, repeat=3)),
    )
    words = [*BERT_SPECIAL, *itertools.islice(pieces, BERT_SIZE - len(BERT_SPECIAL))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    special = dict(zip(names, BERT_SPECIAL, strict=True))
    _write(folder / "special_tokens_map.json", special)
    settings = {
        "do_basic_tokenize": True,
        "do_lower_case": True,
        "model_max_length": 1000000000000000019884624838656,
        "never_split": None,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "tokenizer_class": "BertTokenizer",
    }
    _write(folder / "tokenizer_config.json", special | settings)


@functools.cache
def _clip_files() -> tuple[str, str, str]:
    """Contents of vocab.json, merges.txt and tokenizer.json."""
    from transformers import CLIPTokenizer

    merges = _merges()
    letters = _byte_letters()
    words = ["".join(pair) for pair in merges]
    entries = [*letters, *(x + _WORD_END for x in letters), *words, CLIP_START, CLIP_END]
    vocabulary = {entry: i for i, entry in enumerate(entries)}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    core = CLIPTokenizer(vocab=vocabulary, merges=merges).backend_tokenizer
    text = json.dumps(vocabulary, ensure_ascii=False)
    return text, "\n".join(lines) + "\n", core.to_str()


def _merges() -> list[tuple[str, str]]:
    """CLIP_MERGES pairs, each of pieces that are letters or made by an earlier pair."""
    pairs = list(itertools.product(_LETTERS, repeat=2))
    triples = list(itertools.product(_LETTERS, repeat=3))
    found = itertools.chain(
        pairs,
        ((a, b + _WORD_END) for a, b in pairs),
        ((a + b, c) for a, b, c in triples),
        ((a + b, c + _WORD_END) for a, b, c in triples),
        ((a + b + c, d) for a, b, c, d in itertools.product(_LETTERS, repeat=4)),
    )
    return list(itertools.islice(found, CLIP_MERGES))


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
