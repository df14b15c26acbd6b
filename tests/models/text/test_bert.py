# SPDX-License-Identifier: Apache-2.0
"""BertModel: shapes, names, masking, dtype and refusal of variants. Numbers: parity/."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from digseg_jax import trees
from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.models.text.bert import BertConfig, BertModel, masked_mean

SMALL = BertConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=24,
    max_position_embeddings=12,
)
IDS = jnp.arange(14).reshape(2, 7)
MASK = jnp.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]])


def make(config: BertConfig = SMALL, **options) -> BertModel:
    return BertModel(config, rngs=nnx.Rngs(0), **options)


def test_output_shapes():
    out = make()(IDS, MASK)
    assert out.last_hidden_state.shape == (2, 7, 16)
    assert out.pooled.shape == (2, 16)


def test_parameter_paths_are_transformers_keys():
    _, params = functional.abstract(make)
    paths = set(trees.flatten(params))
    assert {
        "embeddings.word_embeddings.embedding",
        "embeddings.position_embeddings.embedding",
        "embeddings.token_type_embeddings.embedding",
        "embeddings.LayerNorm.scale",
        "encoder.layer.1.attention.self.query.kernel",
        "encoder.layer.1.attention.output.dense.bias",
        "encoder.layer.1.attention.output.LayerNorm.bias",
        "encoder.layer.1.intermediate.dense.kernel",
        "encoder.layer.1.output.dense.kernel",
        "pooler.dense.kernel",
    } <= paths
    assert len(paths) == 5 + 2 * 16 + 2


def test_masked_tokens_do_not_change_the_others():
    model = make()
    changed = IDS.at[1, 3:].set(39)
    a, b = (model(ids, MASK).last_hidden_state for ids in (IDS, changed))
    np.testing.assert_allclose(a[1, :3], b[1, :3], atol=1e-6)
    assert jnp.abs(a[1, 3:] - b[1, 3:]).max() > 1e-2


def test_no_mask_means_all_tokens():
    model = make()
    with_ones = model(IDS, jnp.ones_like(IDS)).last_hidden_state
    np.testing.assert_allclose(model(IDS).last_hidden_state, with_ones, atol=1e-6)


def test_padding_length_does_not_matter():
    model = make()
    short = model(IDS[1:, :3]).last_hidden_state
    np.testing.assert_allclose(model(IDS, MASK).last_hidden_state[1:, :3], short, atol=1e-5)


def test_pooled_without_pooler_is_the_masked_mean():
    model = make(dataclasses.replace(SMALL, add_pooling_layer=False))
    assert not hasattr(model, "pooler")
    out = model(IDS, MASK)
    np.testing.assert_allclose(out.pooled[1], out.last_hidden_state[1, :3].mean(0), atol=1e-6)
    np.testing.assert_allclose(out.pooled[0], out.last_hidden_state[0].mean(0), atol=1e-6)


def test_masked_mean_of_nothing_is_zero():
    assert not masked_mean(jnp.ones((1, 3, 2)), jnp.zeros((1, 3), bool)).any()


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters():
    exact, rough = make()(IDS, MASK), make(dtype=jnp.bfloat16)
    _, params = functional.split(rough)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    out = rough(IDS, MASK).last_hidden_state
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact.last_hidden_state, atol=0.1)


def test_too_many_tokens_is_an_error_that_gives_both_numbers():
    with pytest.raises(UserError, match="13 tokens.* 12"):
        make()(jnp.zeros((1, 13), int))


def test_config_round_trips_and_ignores_what_it_need_not_know():
    values = SMALL.to_dict() | {"use_cache": True, "transformers_version": "4.8.2"}
    assert BertConfig.from_dict(values) == SMALL
    assert values["model_type"] == "bert" and values["architectures"] == ["BertModel"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_act", "relu"), ("position_embedding_type", "relative_key"), ("is_decoder", True)],
)
def test_unsupported_variants_are_refused_by_name(key, value):
    with pytest.raises(UserError, match=f"{key}={value!r}"):
        BertConfig.from_dict({key: value})


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="num_attention_heads 3"):
        dataclasses.replace(SMALL, num_attention_heads=3)
