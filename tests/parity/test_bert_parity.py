# SPDX-License-Identifier: Apache-2.0
"""BERT against torch transformers: live where torch is installed, else against stored outputs."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from oracle import GOLDEN, fill_torch, relative_l2, seeded_input
from safetensors.numpy import load_file, save_file

from digseg_jax.errors import UserError
from digseg_jax.segmentation.prompt_bank import encode_prompts
from digseg_jax.weights import load_component, load_text_tower, minilm_folder, save_component

LIMIT, LIMIT_BF16 = 1e-5, 2e-2  # relative L2
SMALL = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
}


@pytest.fixture(scope="module")
def minilm():
    try:
        minilm_folder()
    except UserError as error:
        pytest.skip(str(error))
    return load_text_tower("minilm")


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "bert_minilm.npz")


def test_tokenizer_gives_transformers_ids(minilm, golden):
    ids, mask = minilm.tokenizer(golden["prompts"].tolist(), golden["ids"].shape[1])
    np.testing.assert_array_equal(ids, golden["ids"])
    np.testing.assert_array_equal(mask, golden["mask"])


def test_real_weights_give_the_stored_outputs(minilm, golden):
    model = load_component(minilm_folder())
    out = model(jnp.asarray(golden["ids"]), jnp.asarray(golden["mask"]))
    hidden = np.asarray(out.last_hidden_state)
    assert relative_l2(hidden[..., :: int(golden["stride"])], golden["hidden_slice"]) <= LIMIT
    assert relative_l2(hidden.mean(-1), golden["hidden_mean"]) <= 10 * LIMIT  # means near zero
    assert relative_l2(hidden.std(-1), golden["hidden_std"]) <= LIMIT
    assert relative_l2(out.pooled, golden["pooled"]) <= LIMIT


@pytest.fixture
def small(tmp_path):
    pytest.importorskip("torch")
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(**SMALL))
    fill_torch(model)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def inputs():
    ids = (np.abs(seeded_input("ids", (3, 9))) * 20).astype(np.int64) % 60
    mask = np.arange(9)[None] < np.array([[9], [4], [1]])
    return ids, mask


def torch_outputs(model, ids, mask):
    import torch

    with torch.no_grad():
        out = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask.astype(np.int64)))
    return out


def compare(ours, theirs) -> None:
    assert relative_l2(ours.last_hidden_state, theirs.last_hidden_state.numpy()) <= LIMIT
    assert relative_l2(ours.pooled, theirs.pooler_output.numpy()) <= LIMIT


def test_small_random_model(small):
    model, folder = small
    ids, mask = inputs()
    ours = load_component(folder)(jnp.asarray(ids), jnp.asarray(mask))
    compare(ours, torch_outputs(model, ids, mask))


def test_small_random_model_in_old_key_style(small):
    model, folder = small
    tensors = load_file(folder / "model.safetensors")
    old = {
        "bert."
        + key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for key, value in tensors.items()
    }
    old["bert.embeddings.position_ids"] = np.arange(20)[None]
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    ids, mask = inputs()
    ours = load_component(folder)(jnp.asarray(ids), jnp.asarray(mask))
    compare(ours, torch_outputs(model, ids, mask))


def test_masked_language_model_checkpoint(tmp_path):
    pytest.importorskip("torch")
    from transformers import BertConfig, BertForMaskedLM

    model = BertForMaskedLM(BertConfig(**SMALL))
    fill_torch(model)
    model.save_pretrained(tmp_path)
    ids, mask = inputs()
    ours = load_component(tmp_path)
    theirs = torch_outputs(model.bert, ids, mask)
    hidden = ours(jnp.asarray(ids), jnp.asarray(mask)).last_hidden_state
    assert not ours.config.add_pooling_layer
    assert relative_l2(hidden, theirs.last_hidden_state.numpy()) <= LIMIT


def test_round_trip_through_our_files_is_bit_identical(small, tmp_path):
    import torch
    from transformers import BertModel

    model, folder = small
    save_component(load_component(folder), tmp_path / "ours")
    again = BertModel.from_pretrained(tmp_path / "ours")
    expected, got = model.state_dict(), again.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)


def sentence_cosines(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    unit = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
    return unit @ unit.T


def test_real_weights_in_bfloat16(minilm, golden):
    model = load_component(minilm_folder(), dtype=jnp.bfloat16)
    out = model(jnp.asarray(golden["ids"]), jnp.asarray(golden["mask"]))
    hidden = np.asarray(out.last_hidden_state, np.float32)
    stride = int(golden["stride"])
    assert relative_l2(hidden[..., ::stride], golden["hidden_slice"]) <= LIMIT_BF16
    assert relative_l2(np.asarray(out.pooled, np.float32), golden["pooled"]) <= LIMIT_BF16


def test_real_weights_and_sentence_similarities(minilm, golden):
    pytest.importorskip("torch")
    from transformers import BertModel

    prompts = golden["prompts"].tolist()
    bank = encode_prompts(minilm.graphdef, minilm.params, minilm.tokenizer, prompts, max_length=16)
    ids, mask = minilm.tokenizer(prompts, 16)
    model = BertModel.from_pretrained(minilm_folder()).eval()
    theirs = torch_outputs(model, ids.astype(np.int64), mask).last_hidden_state.numpy()
    assert relative_l2(bank.tokens, theirs) <= LIMIT
    ours, expected = (sentence_cosines(np.asarray(x), mask) for x in (bank.tokens, theirs))
    np.testing.assert_allclose(ours, expected, atol=1e-4)
