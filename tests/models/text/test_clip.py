# SPDX-License-Identifier: Apache-2.0
"""CLIP's towers: shapes, causality, the end of a text, and configs; numbers are in tests/parity."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from digseg_jax import trees
from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.models.text.clip import ACTIVATIONS
from digseg_jax.models.text.clip_text import (
    ClipTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    ClipTextProjectionConfig,
    without_last_layers,
)
from digseg_jax.models.text.clip_vision import (
    ClipVisionConfig,
    CLIPVisionModelWithProjection,
    normalize_pixels,
)

SIZES = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "projection_dim": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT = ClipTextConfig(vocab_size=20, max_position_embeddings=7, eos_token_id=19, **SIZES)
VISION = ClipVisionConfig(image_size=8, patch_size=4, **SIZES)
IDS = jnp.array([[18, 3, 4, 19, 19, 19], [18, 5, 19, 0, 0, 0]])


def text(config: ClipTextConfig = TEXT, **options) -> CLIPTextModel:
    return CLIPTextModel(config, rngs=nnx.Rngs(0), **options)


def test_text_shapes_with_and_without_projection():
    out = text()(IDS)
    assert out.last_hidden_state.shape == (2, 6, 8) and out.pooled.shape == (2, 8)
    config = ClipTextProjectionConfig(**dataclasses.asdict(TEXT))
    projected = CLIPTextModelWithProjection(config, rngs=nnx.Rngs(0))(IDS)
    assert projected.last_hidden_state.shape == (2, 6, 8) and projected.pooled.shape == (2, 6)


def test_parameter_paths_are_transformers_keys():
    paths = set(trees.flatten(functional.abstract(text)[1]))
    assert {
        "embeddings.token_embedding.embedding",
        "embeddings.position_embedding.embedding",
        "encoder.layers.1.self_attn.q_proj.kernel",
        "encoder.layers.1.self_attn.out_proj.bias",
        "encoder.layers.1.layer_norm1.scale",
        "encoder.layers.1.mlp.fc1.kernel",
        "final_layer_norm.bias",
    } <= paths
    assert len(paths) == 2 + 2 * 16 + 2


def test_a_token_depends_on_nothing_behind_it():
    model = text()
    changed = IDS.at[0, 4:].set(7)
    a, b = (model(ids).last_hidden_state for ids in (IDS, changed))
    np.testing.assert_array_equal(a[0, :4], b[0, :4])
    assert jnp.abs(a[0, 4:] - b[0, 4:]).max() > 1e-3


def test_pooled_is_the_first_end_of_text_whatever_pads():
    out = text()(IDS)
    np.testing.assert_array_equal(out.pooled[0], out.last_hidden_state[0, 3])
    np.testing.assert_array_equal(out.pooled[1], out.last_hidden_state[1, 2])


def test_an_old_config_goes_by_the_largest_id():
    old = text(dataclasses.replace(TEXT, eos_token_id=2))
    ids = jnp.array([[18, 2, 19, 2]])
    out = old(ids)
    np.testing.assert_array_equal(out.pooled[0], out.last_hidden_state[0, 2])


def test_the_two_activations():
    one = jnp.asarray(1.0)
    assert float(ACTIVATIONS["quick_gelu"](one)) == pytest.approx(1 / (1 + math.exp(-1.702)))
    exact = 0.5 * (1 + math.erf(1 / math.sqrt(2)))
    assert float(ACTIVATIONS["gelu"](one)) == pytest.approx(exact, abs=1e-6)


def test_leaving_out_the_last_layer_keeps_the_rest():
    whole = text()
    assert without_last_layers(whole, 0).config == TEXT
    short = without_last_layers(whole, 1)
    x = whole.encoder.layers[0](whole.embeddings(IDS), None)
    expected = whole.final_layer_norm(x)
    np.testing.assert_allclose(short(IDS).last_hidden_state, expected, atol=1e-6)
    with pytest.raises(UserError, match="cannot drop 2 of 2 text layers; legal: 0 to 1"):
        without_last_layers(whole, 2)


def test_too_many_tokens_is_an_error_that_gives_both_numbers():
    with pytest.raises(UserError, match="8 tokens.* 7"):
        text()(jnp.zeros((1, 8), int))


def test_vision_shapes_and_the_only_legal_size():
    model = CLIPVisionModelWithProjection(VISION, rngs=nnx.Rngs(0))
    out = model(jnp.ones((2, 8, 8, 3)))
    assert out.last_hidden_state.shape == (2, 5, 8) and out.image_embeds.shape == (2, 6)
    with pytest.raises(UserError, match="8x12; the model takes 8x8"):
        model(jnp.ones((1, 8, 12, 3)))


def test_bfloat16_computes_near_float32():
    exact = CLIPVisionModelWithProjection(VISION, rngs=nnx.Rngs(0))
    rough = CLIPVisionModelWithProjection(VISION, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    x = jnp.linspace(-1, 1, 8 * 8 * 3).reshape(1, 8, 8, 3)
    got = rough(x).image_embeds
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), exact(x).image_embeds, atol=0.03)


def test_pixels_have_clips_mean_and_deviation():
    gray = normalize_pixels(jnp.zeros((1, 4, 6, 3)), 8)
    assert gray.shape == (1, 8, 8, 3)
    expected = (0.5 - np.array([0.48145466, 0.4578275, 0.40821073])) / np.array(
        [0.26862954, 0.26130258, 0.27577711]
    )
    np.testing.assert_allclose(gray[0, 3, 3], expected, atol=1e-5)


@pytest.mark.parametrize("config", [TEXT, VISION])
def test_config_round_trips(config):
    values = config.to_dict() | {"attention_dropout": 0.0, "dropout": 0.0}
    assert type(config).from_dict(values) == config
    assert values["architectures"] == [config.CLASS_NAME]


def test_a_tower_is_read_from_a_whole_models_config():
    whole = {
        "model_type": "clip",
        "projection_dim": 6,
        "text_config": {"hidden_size": 4, "projection_dim": 512},
        "text_config_dict": dataclasses.asdict(TEXT),
        "vision_config": dataclasses.asdict(VISION) | {"projection_dim": 512},
    }
    assert ClipTextConfig.from_dict(whole) == TEXT
    assert ClipVisionConfig.from_dict(whole) == VISION


def test_what_a_tower_cannot_be_is_refused_by_name():
    with pytest.raises(UserError, match="hidden_act='relu'; legal: quick_gelu, gelu"):
        dataclasses.replace(TEXT, hidden_act="relu")
    with pytest.raises(UserError, match="num_attention_heads 3"):
        dataclasses.replace(VISION, num_attention_heads=3)
    with pytest.raises(UserError, match="image_size 8 is not a multiple of patch_size 3"):
        dataclasses.replace(VISION, patch_size=3)
