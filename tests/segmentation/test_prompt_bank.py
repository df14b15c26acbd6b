# SPDX-License-Identifier: Apache-2.0
"""Tokenizer and prompt bank, with a tower small enough to build here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.models.text.bert import BertConfig, BertModel
from digseg_jax.models.text.tokenizer import Tokenizer
from digseg_jax.segmentation.prompt_bank import (
    encode_prompts,
    only_sentence_token,
    with_sentence_token,
)
from digseg_jax.weights import load_text_tower, save_component
from digseg_jax.weights.text_tower import load_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "snow", "and", "ice", "wet", "##land"]
CONFIG = BertConfig(
    vocab_size=len(WORDS),
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=8,
    max_position_embeddings=9,
)
PROMPTS = ("snow and ice", "wetland", "Ice", "snow", "and")


@pytest.fixture
def tower_folder(tmp_path: Path) -> Path:
    save_component(BertModel(CONFIG, rngs=nnx.Rngs(1)), tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return tmp_path


@pytest.fixture
def tower():
    return functional.split(BertModel(CONFIG, rngs=nnx.Rngs(1)))


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer.from_vocab(WORDS)


def test_wordpiece_with_special_tokens_and_padding(tokenizer):
    ids, mask = tokenizer(["Wetland snow", "ice"], 6)
    np.testing.assert_array_equal(ids, [[2, 8, 9, 5, 3, 0], [2, 7, 3, 0, 0, 0]])
    np.testing.assert_array_equal(mask.sum(1), [5, 3])


def test_words_without_a_token_are_named(tokenizer):
    """They all are one token: prompts that differ in them alone give the same mask."""
    assert tokenizer.unknown(["snow", "雪 and ice", "湖, wetland", "🌊"]) == ["雪", "湖", ",", "🌊"]
    assert tokenizer.unknown(["Snow and ice"]) == []


def test_case_matters_where_the_settings_say_so():
    cased = Tokenizer.from_vocab(WORDS, {"do_lower_case": False})
    assert cased(["Ice"], 3).ids.tolist() == [[2, 1, 3]]


def test_a_prompt_of_exactly_max_length_is_legal(tokenizer):
    assert tokenizer(["snow and ice"], 5).mask.all()


def test_a_longer_prompt_is_named_and_never_cut(tokenizer):
    with pytest.raises(UserError, match=r"'snow and ice' is 5 tokens long; at most 4"):
        tokenizer(["ice", "snow and ice"], 4)


@pytest.mark.parametrize("blank", ["", "  \t"])
def test_an_empty_prompt_is_refused_with_its_position(tokenizer, blank):
    with pytest.raises(UserError, match="prompt 1 is empty"):
        tokenizer(["ice", blank], 5)


def test_a_vocabulary_without_special_tokens_is_refused():
    with pytest.raises(UserError, match=r"\[CLS\]"):
        Tokenizer.from_vocab(["[PAD]", "[UNK]", "ice"])


def test_tokenizer_json_and_vocab_agree_on_the_real_vocabulary():
    folder = load_folder_or_skip()
    vocab = Tokenizer.from_vocab((folder / "vocab.txt").read_text().rstrip("\n").split("\n"))
    texts = ["Snow and ice", "désert, semi-arid!", "evergreen needleleaf forest", "水 water"]
    fast, slow = load_tokenizer(folder)(texts, 24), vocab(texts, 24)
    np.testing.assert_array_equal(fast.ids, slow.ids)
    np.testing.assert_array_equal(fast.mask, slow.mask)


def load_folder_or_skip() -> Path:
    from digseg_jax.weights import minilm_folder

    try:
        return minilm_folder()
    except UserError as error:
        pytest.skip(str(error))


def test_bank_rows_are_the_towers_last_hidden_states(tower, tokenizer):
    graphdef, params = tower
    bank = encode_prompts(graphdef, params, tokenizer, PROMPTS, max_length=6)
    assert bank.prompts == PROMPTS
    ids, mask = tokenizer(PROMPTS, 6)
    out = functional.merge(graphdef, params)(ids, mask).last_hidden_state
    np.testing.assert_allclose(bank.tokens, out, atol=1e-5)
    np.testing.assert_array_equal(bank.mask, mask)


def test_a_text_as_one_token_is_the_towers_own_vector_or_the_mean_of_its_words(tower, tokenizer):
    ids, mask = tokenizer(PROMPTS, 6)
    out = functional.merge(*tower)(ids, mask)
    own = encode_prompts(*tower, tokenizer, PROMPTS, max_length=6, pooled=True)
    assert own.mask.shape == (len(PROMPTS), 1) and own.mask.all()
    np.testing.assert_allclose(own.tokens[:, 0], out.pooled, atol=1e-5)

    mean = only_sentence_token(encode_prompts(*tower, tokenizer, PROMPTS, max_length=6))
    words = [
        hidden[real].mean(axis=0) for hidden, real in zip(out.last_hidden_state, mask, strict=True)
    ]
    np.testing.assert_allclose(mean.tokens[:, 0], words, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 64])
def test_batch_size_does_not_change_the_bank(tower, tokenizer, batch_size):
    whole = encode_prompts(*tower, tokenizer, PROMPTS, max_length=6)
    parts = encode_prompts(*tower, tokenizer, PROMPTS, max_length=6, batch_size=batch_size)
    np.testing.assert_allclose(parts.tokens, whole.tokens, atol=1e-5)


def test_no_prompts_is_an_error(tower, tokenizer):
    with pytest.raises(UserError, match="no prompts"):
        encode_prompts(*tower, tokenizer, (), max_length=6)


def test_tower_from_a_folder(tower_folder, tower):
    loaded = load_text_tower(str(tower_folder))
    assert (loaded.width, loaded.max_length) == (8, 9)
    ours = encode_prompts(loaded.graphdef, loaded.params, loaded.tokenizer, PROMPTS, max_length=6)
    direct = encode_prompts(*tower, Tokenizer.from_vocab(WORDS), PROMPTS, max_length=6)
    np.testing.assert_allclose(ours.tokens, direct.tokens, atol=1e-6)


def test_vocab_settings_are_read_from_tokenizer_config(tower_folder):
    (tower_folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert load_tokenizer(tower_folder)(["Ice"], 3).ids.tolist() == [[2, 1, 3]]


def test_a_folder_without_tokenizer_says_what_it_wants(tower_folder):
    (tower_folder / "vocab.txt").unlink()
    with pytest.raises(UserError, match=r"no tokenizer.json, no vocab.json, no vocab.txt"):
        load_text_tower(str(tower_folder))


def test_a_malformed_tokenizer_json_is_one_clear_line(tower_folder):
    (tower_folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"not a tokenizer.json") as caught:
        load_text_tower(str(tower_folder))
    assert str(tower_folder) in str(caught.value)


def test_the_sentence_token_is_the_mean_of_the_real_ones(tower, tokenizer):
    bank = encode_prompts(*tower, tokenizer, PROMPTS, max_length=6)
    longer = with_sentence_token(bank)
    assert longer.prompts == bank.prompts and longer.mask[:, -1].all()
    np.testing.assert_array_equal(longer.tokens[:, :-1], bank.tokens)
    np.testing.assert_array_equal(longer.mask[:, :-1], bank.mask)
    for i, mask in enumerate(np.asarray(bank.mask)):
        expected = np.asarray(bank.tokens)[i][mask].mean(axis=0)
        np.testing.assert_allclose(longer.tokens[i, -1], expected, atol=1e-6)


def test_padding_that_is_attended_to_is_no_part_of_the_mean(tower, tokenizer):
    bank = encode_prompts(*tower, tokenizer, PROMPTS, max_length=6, mask_padding=False)
    longer, alone = with_sentence_token(bank), only_sentence_token(bank)
    assert longer.mask.all() and alone.real.all()
    for i, own in enumerate(tokenizer(PROMPTS, 6)[1]):
        expected = np.asarray(bank.tokens)[i][own.astype(bool)].mean(axis=0)
        np.testing.assert_allclose(longer.tokens[i, -1], expected, atol=1e-6)
        np.testing.assert_allclose(alone.tokens[i, 0], expected, atol=1e-6)
