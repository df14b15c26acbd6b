# SPDX-License-Identifier: Apache-2.0
"""Text towers of open_clip: its defaults and old names are known, what is no BERT is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
from flax import nnx
from tiny import one_line

from digseg_jax.errors import UserError
from digseg_jax.models.text.bert import BertConfig
from digseg_jax.models.text.open_clip import HFTextEncoder, OpenClipTextConfig
from digseg_jax.weights import load_component, save_component


def shapes(width: int = 768, positions: int = 512, types: int = 2) -> dict[str, tuple[int, ...]]:
    """Shapes by which the reader infers a tower's sizes."""
    prefix = "text.transformer."
    return {
        f"{prefix}embeddings.word_embeddings.weight": (30522, width),
        f"{prefix}embeddings.position_embeddings.weight": (positions, width),
        f"{prefix}embeddings.token_type_embeddings.weight": (types, width),
        f"{prefix}encoder.layer.0.intermediate.dense.weight": (4 * width, width),
        f"{prefix}encoder.layer.11.intermediate.dense.weight": (4 * width, width),
    }


def read(stored: dict[str, tuple[int, ...]], **text) -> OpenClipTextConfig:
    """The config of a tower whose file says `text`."""
    values = {"embed_dim": 512, "text_cfg": {"hf_model_name": "org/bert"} | text}
    return OpenClipTextConfig.from_checkpoint({"model_cfg": values}, stored)


def refused(stored: dict[str, tuple[int, ...]], **text) -> str:
    with pytest.raises(UserError) as caught:
        read(stored, **text)
    return one_line(caught.value)


@pytest.mark.parametrize(
    ("stored", "name"),
    [
        (shapes(positions=514, types=1), "org/anonymous"),
        (shapes(types=1), "org/anonymous"),
        (shapes(positions=514), "org/anonymous"),
        (shapes(), "roberta-base"),
        (shapes(width=1024), "xlm-RoBERTa-large"),
    ],
)
def test_a_roberta_has_berts_keys_and_is_refused(stored, name):
    """Its positions begin at 2, its padding is 1: as a BERT it would give other numbers."""
    assert f"hf_model_name={name!r} is no BERT" in refused(stored, hf_model_name=name)


@pytest.mark.parametrize(("width", "heads"), [(768, 12), (1024, 16)])
def test_the_heads_of_usual_widths_are_known(width, heads):
    assert read(shapes(width)).bert.num_attention_heads == heads
    assert read(shapes(width), heads=heads).bert.num_attention_heads == heads
    assert f"text_cfg.heads=8: the number of heads of {width}" in refused(shapes(width), heads=8)


def test_those_of_other_widths_must_be_stated():
    """A MiniLM has 12 heads of 32 channels, not 6 of 64."""
    message = refused(shapes(384))
    assert "the number of heads of 384 channels is not known" in message and "'org/bert'" in message
    assert read(shapes(384), heads=12).bert.num_attention_heads == 12
    for wrong in (0, -1, 7):
        assert f"text_cfg.heads={wrong}" in refused(shapes(384), heads=wrong)
    assert "'heads'" in refused(shapes(384), heads="12")


def test_what_a_file_leaves_out_is_open_clips_default():
    config = read(shapes())
    assert (config.projection, config.pooler) == ("mlp", "mean_pooler")
    assert not config.bert.add_pooling_layer


def test_open_clips_first_names_are_understood():
    config = read(shapes(), proj="linear", pooler_type="cls_pooler")
    assert (config.projection, config.pooler) == ("linear", "cls_pooler")
    assert config.bert.add_pooling_layer
    assert "hf_proj_type='deep' is not supported" in refused(shapes(), proj="deep")


def test_the_heads_survive_a_file_where_the_width_does_not_tell_them(tmp_path):
    bert = BertConfig(
        vocab_size=12,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=8,
        max_position_embeddings=9,
        add_pooling_layer=False,
    )
    config = OpenClipTextConfig(bert, 4, "mlp", "mean_pooler", 8, "org/bert")
    save_component(HFTextEncoder(config, rngs=nnx.Rngs(0)), tmp_path)
    assert load_component(tmp_path).config == config
    usual = dataclasses.replace(bert, hidden_size=768, num_attention_heads=12)
    written = dataclasses.replace(config, bert=usual).to_dict()
    assert "heads" not in json.dumps(written)
