# SPDX-License-Identifier: Apache-2.0
"""Builds tokenizers from the files in checkpoints and packages, without a network."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

from digseg_jax.errors import UserError
from digseg_jax.io.files import UnreadableError, read_bytes
from digseg_jax.io.json_file import parse_object
from digseg_jax.models.text.tokenizer import Tokenizer

MAX_TEXT = 64 * 2**20  # bytes; the largest file of the known text encoders has 17 MB
CLIP_BPE = "bpe_simple_vocab_16e6.txt"  # OpenAI's CLIP and open_clip have it, mostly with ".gz"
SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")  # may name the padding token


def load_tokenizer(path: str | Path, pad_token: str | None = None) -> Tokenizer:
    """Builds a tokenizer from a folder, or from a vocabulary file with the settings beside it.

    The first of these in the folder is taken: tokenizer.json, vocab.json with merges.txt (CLIP),
    vocab.txt (BERT), bpe_simple_vocab_16e6.txt[.gz] (CLIP). The padding token is the one that
    special_tokens_map.json or else tokenizer_config.json names, "!" (id 0) in Stable Diffusion 2.x and
    the end of text (49407) in 1.x; if they name none, it is the vocabulary's own. `pad_token` replaces
    what they say.

    Raises:
        UserError: none of the files is there, or one is malformed.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent

    # A vocabulary file is read by its own reader only; in a folder, the order of `_READERS` decides.
    readers = [r for r in _READERS if path.is_dir() or r == path.name]
    for name in readers:
        if (folder / name).is_file():
            try:
                return _READERS[name](folder, pad_token or _pad_token(folder))
            except (ValueError, OSError) as error:  # UserError, malformed JSON, UTF-8 or gzip
                raise UserError(f"{folder}: {error}") from error

    names = ", no ".join(("tokenizer.json", "vocab.json", "vocab.txt", f"{CLIP_BPE}.gz"))
    raise UserError(f"no {names} in {path}")


def has_tokenizer(folder: Path) -> bool:
    """True if `load_tokenizer` would find a file in `folder`."""
    return any((folder / name).is_file() for name in _READERS)


def _pad_token(folder: Path) -> str | None:
    """The padding token that the settings name; None if they name none."""
    for name in SETTINGS:
        token = _json(folder / name).get("pad_token")
        if isinstance(token, dict):  # the form of an added token, with flags beside its text
            token = token.get("content")
        if token is not None:
            return token
    return None


def _json(path: Path) -> dict[str, Any]:
    """A JSON file's object, empty if there is no such file; raises UserError for other JSON."""
    if not path.is_file():
        return {}
    text = _text(path)
    try:
        return parse_object(text)
    except ValueError as error:
        raise UserError(f"{path.name}: {error}") from error


def _text(path: Path) -> str:
    """A file of the tokenizer as text; raises UnreadableError beyond MAX_TEXT."""
    return read_bytes(path, MAX_TEXT).decode("utf-8")


def _lines(text: str) -> list[str]:
    """The lines of a text: split at newlines only, because tokens may hold Unicode's other breaks."""
    return text.rstrip("\n").split("\n")


def _fast(folder: Path, pad_token: str | None) -> Tokenizer:
    """Reads tokenizer.json, the format of Hugging Face's tokenizers."""
    return Tokenizer.from_json(_text(folder / "tokenizer.json"), pad_token)


def _clip(folder: Path, pad_token: str | None) -> Tokenizer:
    """Reads vocab.json and merges.txt of CLIP."""
    merges = _lines(_text(folder / "merges.txt"))

    # The first line may be a header.
    if merges[0].startswith("#version"):
        merges = merges[1:]
    return Tokenizer.from_clip(_json(folder / "vocab.json"), merges, pad_token)


def _bert(folder: Path, _pad_token: str | None) -> Tokenizer:
    """Reads vocab.txt of BERT; its padding token is the vocabulary's own."""
    settings = _json(folder / "tokenizer_config.json")
    return Tokenizer.from_vocab(_lines(_text(folder / "vocab.txt")), settings)


def _bpe(folder: Path, pad_token: str | None) -> Tokenizer:
    """Reads OpenAI's byte-pair merges, from which the vocabulary follows."""
    return Tokenizer.from_clip_bpe(_lines(_text(folder / CLIP_BPE)), pad_token)


def _bpe_gz(folder: Path, pad_token: str | None) -> Tokenizer:
    """Reads the same, compressed."""
    path = folder / f"{CLIP_BPE}.gz"

    # A small file can unpack to gigabytes: stop one byte past the limit.
    with gzip.open(path) as file:
        data = file.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise UnreadableError(f"{path}: unpacks to more than the {MAX_TEXT} bytes that are read")

    return Tokenizer.from_clip_bpe(_lines(data.decode("utf-8")), pad_token)


# Reader by file name; a folder is searched in this order.
_READERS: dict[str, Callable[[Path, str | None], Tokenizer]] = {
    "tokenizer.json": _fast,
    "vocab.json": _clip,
    "vocab.txt": _bert,
    CLIP_BPE: _bpe,
    f"{CLIP_BPE}.gz": _bpe_gz,
}
