# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in and out: layouts, key spellings, and one clear line for every fault."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from digseg_jax import trees, weights
from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.models.text.bert import BertConfig, BertModel
from digseg_jax.weights import keymap
from digseg_jax.weights.safetensors_io import write_component

CONFIG = BertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=6,
)
QUERY = "encoder.layer.0.attention.self.query.weight"


@pytest.fixture
def params():
    return functional.split(BertModel(CONFIG, rngs=nnx.Rngs(3)))[1]


@pytest.fixture
def folder(tmp_path, params) -> Path:
    weights.save_component((CONFIG, params), tmp_path / "bert")
    return tmp_path / "bert"


def rewrite(folder: Path, change) -> None:
    """Applies `change` to the dict of hub tensors in a folder."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file, metadata={"format": "pt"})


def assert_same(a, b) -> None:
    a, b = trees.flatten(a), trees.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def loaded(path, **options):
    return functional.split(weights.load_component(path, **options))[1]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(folder, value):
    """They gave black masks, and exit status 0."""

    def spoil(tensors):
        tensors[QUERY][0, 0] = value

    rewrite(folder, spoil)
    with pytest.raises(UserError, match=f"model.safetensors: {QUERY} has values that are no numbers"):
        loaded(folder)


def test_large_weights_are_numbers(folder):
    def enlarge(tensors):
        tensors[QUERY][:] = 3e38

    rewrite(folder, enlarge)
    loaded(folder)


def test_save_then_load_is_bit_identical(folder, params):
    assert_same(loaded(folder), params)


def test_saved_tensors_have_torch_layout_and_names(folder, params):
    tensors = load_file(folder / "model.safetensors")
    kernel = trees.flatten(params)["encoder.layer.0.intermediate.dense.kernel"]
    assert kernel.shape == (8, 12)
    np.testing.assert_array_equal(
        tensors["encoder.layer.0.intermediate.dense.weight"], np.asarray(kernel).T
    )
    assert tensors["embeddings.word_embeddings.weight"].shape == (20, 8)
    assert not [k for k in tensors if k.endswith(("kernel", "scale", "embedding"))]


def test_a_module_saves_like_its_config_and_params(tmp_path, params):
    weights.save_component(BertModel(CONFIG, rngs=nnx.Rngs(3)), tmp_path)
    assert_same(loaded(tmp_path), params)


def test_metadata_is_kept_and_always_names_the_format(tmp_path, params):
    weights.save_component((CONFIG, params), tmp_path, {"command": "python x"})
    assert weights.read_metadata(tmp_path) == {"command": "python x", "format": "pt"}


@pytest.mark.usefixtures("unchecked")
def test_metadata_must_be_strings(tmp_path, params):
    with pytest.raises(UserError, match="str to str, got 'steps': 3"):
        weights.save_component((CONFIG, params), tmp_path, {"steps": 3})


def test_saving_leaves_no_temporary_file_and_replaces_the_old(folder, params):
    before = sorted(p.name for p in folder.iterdir())
    weights.save_component((CONFIG, jax.tree.map(jnp.zeros_like, params)), folder)
    assert sorted(p.name for p in folder.iterdir()) == before == ["config.json", "model.safetensors"]
    assert not loaded(folder)["pooler"]["dense"]["kernel"].any()


def test_a_failed_save_keeps_the_old_file(folder, params, monkeypatch):
    def crash(arrays, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("digseg_jax.weights.safetensors_io.save_file", crash)
    with pytest.raises(OSError, match="disk full"):
        weights.save_component((CONFIG, jax.tree.map(jnp.zeros_like, params)), folder)
    assert_same(loaded(folder), params)
    assert len(list(folder.iterdir())) == 2


def test_shards(folder, params):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {k: names[i % 2] for i, k in enumerate(tensors)}
    for name in names:
        save_file({k: v for k, v in tensors.items() if weight_map[k] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(loaded(folder), params)
    (folder / names[1]).unlink()
    with pytest.raises(UserError, match=f"missing: {names[1]}"):
        loaded(folder)


def test_fp16_variant_is_read_to_float32(folder, params):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    half = {k: v.astype(np.float16) for k, v in tensors.items()}
    save_file(half, folder / "model.fp16.safetensors")
    got = loaded(folder)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("float32")}
    assert_same(got, jax.tree.map(lambda x: x.astype(jnp.float16).astype(jnp.float32), params))


def test_full_precision_wins_over_fp16(folder, params):
    save_file({}, folder / "model.fp16.safetensors")
    assert_same(loaded(folder), params)


def test_bfloat16_in_and_out(tmp_path, params):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    weights.save_component((CONFIG, half), tmp_path)
    assert load_file(tmp_path / "model.safetensors")[QUERY].dtype == ml_dtypes.bfloat16
    assert_same(loaded(tmp_path, param_dtype=jnp.bfloat16), half)


def test_compute_dtype_and_parameter_dtype_are_two_things(folder):
    model = weights.load_component(folder, dtype=jnp.bfloat16)
    assert model(jnp.ones((1, 3), int)).last_hidden_state.dtype == jnp.bfloat16
    assert model.pooler.dense.kernel.dtype == jnp.float32


def test_bert_prefix_old_norms_heads_and_buffers(folder, params):
    def old(tensors):
        spelt = {
            "bert."
            + k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): v
            for k, v in tensors.items()
        }
        spelt["bert.embeddings.position_ids"] = np.arange(6)[None]
        spelt["cls.predictions.bias"] = np.zeros(20, np.float32)
        return spelt

    rewrite(folder, old)
    assert_same(loaded(folder), params)


def test_a_checkpoint_without_pooler_makes_a_model_without_pooler(folder):
    rewrite(folder, lambda t: {k: v for k, v in t.items() if "pooler" not in k})
    model = weights.load_component(folder)
    assert not model.config.add_pooling_layer


@pytest.mark.parametrize(
    ("old", "new"),
    [("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")],
)
def test_old_vae_attention_keys(old, new):
    parent = "decoder.mid_block.attentions.0"
    assert keymap.VAE_RULES.rename(f"{parent}.{old}.weight") == f"{parent}.{new}.weight"


def test_vae_rules_leave_bert_keys_and_new_keys_alone():
    assert keymap.BERT_RULES.rename(QUERY) == QUERY
    new = "encoder.mid_block.attentions.0.to_out.0.bias"
    assert keymap.VAE_RULES.rename(new) == new


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("a.0.kernel", (3, 3, 4, 5)),
        ("a.kernel", (4, 5)),
        ("a.scale", (4,)),
        ("a.bias", (4,)),
        ("a.embedding", (7, 4)),
        ("logit_scale", ()),
    ],
)
def test_to_hub_and_back(path, shape):
    leaf = np.random.default_rng(0).standard_normal(shape)
    stored = keymap.to_hub(path, leaf)
    assert stored.shape == keymap.hub_shape(path, shape)
    assert keymap.fits(path, stored.shape, shape)
    np.testing.assert_array_equal(keymap.from_hub(path, stored, shape), leaf)


def test_linear_layers_stored_as_1x1_convolutions_and_the_reverse():
    linear = np.arange(6.0).reshape(2, 3)  # [out, in]
    for stored, shape in ((linear[..., None, None], (3, 2)), (linear, (1, 1, 3, 2))):
        assert keymap.fits("a.kernel", stored.shape, shape)
        got = keymap.from_hub("a.kernel", stored, shape)
        np.testing.assert_array_equal(got.reshape(3, 2), linear.T)
    assert not keymap.fits("a.kernel", (2, 3, 3, 3), (3, 2))
    assert not keymap.fits("a.kernel", (3, 2, 1, 1), (3, 2))


def error_of(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        loaded(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_one_error_lists_missing_unexpected_and_misshaped(folder):
    def spoil(tensors):
        tensors["encoder.layer.0.output.dense.wait"] = tensors.pop(
            "encoder.layer.0.output.dense.weight"
        )
        tensors[QUERY] = np.zeros((8, 9), np.float32)

    rewrite(folder, spoil)
    text = error_of(folder)
    assert str(folder / "model.safetensors") in text
    assert "1 missing: encoder.layer.0.output.dense.weight; did you mean" in text
    assert "1 unexpected: encoder.layer.0.output.dense.wait" in text
    assert f"{QUERY} is [8, 9], the model wants [8, 8]" in text


def test_a_surplus_key_is_shown_beside_the_nearest_of_the_model(folder):
    rewrite(folder, lambda t: {**t, QUERY.replace("weight", "wait"): t[QUERY]})
    text = error_of(folder)
    assert f"1 unexpected: {QUERY.replace('weight', 'wait')}; did you mean '{QUERY}'?" in text
    assert "missing" not in text


def test_long_lists_are_cut(folder):
    rewrite(folder, lambda t: {k: v for k, v in t.items() if "encoder" not in k})
    assert "16 missing: " in error_of(folder)
    assert "and 13 more" in error_of(folder)


def test_a_key_in_two_spellings_is_refused(folder):
    rewrite(folder, lambda t: {**t, f"bert.{QUERY}": t[QUERY]})
    assert f"1 stored twice: bert.{QUERY} and {QUERY}" in error_of(folder)


def test_load_params_follows_an_abstract_tree(folder, params):
    _, abstract = functional.abstract(lambda: BertModel(CONFIG, rngs=nnx.Rngs(0)))
    assert_same(weights.load_params(folder, abstract), params)


@pytest.fixture
def conv_in():
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 4, 5)), jnp.float32)
    return {"conv_in": {"kernel": kernel, "bias": jnp.arange(5.0)}, "rest": jnp.ones(1)}


def test_widening_repeats_and_halves_as_marigold_does(conv_in):
    wide = weights.widen_conv_in(conv_in)
    kernel = conv_in["conv_in"]["kernel"]
    np.testing.assert_array_equal(wide["conv_in"]["kernel"][:, :, :4], kernel * 0.5)
    np.testing.assert_array_equal(wide["conv_in"]["kernel"][:, :, 4:], kernel * 0.5)
    np.testing.assert_array_equal(wide["conv_in"]["bias"], conv_in["conv_in"]["bias"])
    assert wide["rest"] is conv_in["rest"] and kernel.shape == (3, 3, 4, 5)


def test_narrowing_undoes_widening_exactly(conv_in):
    assert_same(weights.narrow_conv_in(weights.widen_conv_in(conv_in)), conv_in)


def test_widening_a_wide_kernel_is_an_error(conv_in):
    with pytest.raises(UserError, match="8 inputs, expected 4"):
        weights.widen_conv_in(weights.widen_conv_in(conv_in))


def test_others_may_read_the_weights_as_far_as_the_user_lets_them_read_other_files(tmp_path):
    written = write_component(tmp_path, {"a": 1}, {"x": np.zeros(3)}, "model")
    (tmp_path / "other").touch()
    assert written.stat().st_mode == (tmp_path / "other").stat().st_mode
