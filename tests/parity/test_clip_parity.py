# SPDX-License-Identifier: Apache-2.0
"""CLIP's and BiomedCLIP's towers against torch: live where it is installed, else stored outputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from oracle import GOLDEN, fill_torch, nhwc, relative_l2, run, seeded_component, seeded_tensor
from safetensors.numpy import load_file, save_file
from towers import (
    CLIP,
    OPEN_CLIP,
    OPEN_CLIP_BERT,
    bert_ids,
    clip_ids,
    pixels,
    torch_model,
    torch_open_clip,
    torch_outputs,
)

from digseg_jax import trees
from digseg_jax.models import functional
from digseg_jax.models.text.bert import BertConfig
from digseg_jax.models.text.clip_text import without_last_layers
from digseg_jax.models.text.open_clip import HFTextEncoder, OpenClipTextConfig
from digseg_jax.weights import keymap, load_component, save_component

LIMIT = 1e-5  # relative L2
towers = pytest.mark.parametrize("name", list(CLIP))


def our_outputs(name: str, model) -> tuple[np.ndarray, np.ndarray]:
    """Token features and the pooled vector of our tower on the shared inputs."""
    if name == "vision":
        return run(model, "__call__", nhwc(pixels()))
    ids, mask = bert_ids() if name == "open_clip" else clip_ids()
    return run(model, "__call__", ids, mask)


def compare(ours, theirs) -> None:
    for got, expected in zip(ours, theirs, strict=True):
        assert relative_l2(got, expected) <= LIMIT


def stored(name: str) -> tuple[np.ndarray, np.ndarray]:
    golden = np.load(GOLDEN / "clip_small.npz")
    return golden[f"{name}_tokens"], golden[f"{name}_pooled"]


@towers
def test_seeded_weights_give_the_stored_outputs(tmp_path, name):
    model = seeded_component(CLIP[name], tmp_path)
    compare(our_outputs(name, model), stored(name))


def test_padding_with_another_id_changes_no_real_token(tmp_path):
    model = seeded_component(CLIP["text_gelu"], tmp_path)
    a, b = (run(model, "__call__", *clip_ids(padding)) for padding in (58, 0))
    _, mask = clip_ids()
    np.testing.assert_array_equal(a.last_hidden_state[mask], b.last_hidden_state[mask])
    np.testing.assert_array_equal(a.pooled, b.pooled)


def open_clip_folder(folder: Path) -> Path:
    """A checkpoint in open_clip's layout: seeded text tower, an image tower and buffers beside it."""
    bert = BertConfig.from_dict(OPEN_CLIP_BERT | {"add_pooling_layer": False})
    config = OpenClipTextConfig(
        bert, 16, "mlp", "cls_last_hidden_state_pooler", 16, "bert-base-uncased"
    )
    _, params = functional.abstract(lambda: HFTextEncoder(config, rngs=functional.FixedRngs()))
    tensors = {}
    for path, leaf in trees.flatten(params).items():
        key = keymap.hub_key(path)
        tensors[f"text.{key}"] = seeded_tensor(key, keymap.hub_shape(path, leaf.shape))
    tensors["text.transformer.embeddings.position_ids"] = np.arange(20)[None]
    tensors["visual.trunk.cls_token"] = np.zeros((1, 1, 8), np.float32)
    tensors["visual.head.proj.weight"] = np.zeros((16, 8), np.float32)
    tensors["logit_scale"] = np.array(4.6, np.float32)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    (folder / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    return folder


def test_an_open_clip_checkpoint_gives_the_stored_outputs(tmp_path):
    model = load_component(open_clip_folder(tmp_path), expect="HFTextEncoder")
    assert model.config.max_position_embeddings == 16
    compare(our_outputs("open_clip", model), stored("open_clip"))


@pytest.fixture
def torch_tower(tmp_path, name):
    pytest.importorskip("torch")
    model = torch_model(CLIP[name])
    fill_torch(model)
    model.save_pretrained(tmp_path / "torch")
    return model, tmp_path / "torch"


@towers
def test_live_and_in_both_key_styles(torch_tower, name):
    """transformers 5 has dropped, and may write or not, the prefix `text_model.`."""
    theirs, folder = torch_tower
    expected = torch_outputs(name, theirs)
    compare(our_outputs(name, load_component(folder)), expected)
    file = folder / "model.safetensors"
    bare = {k.removeprefix("text_model."): v for k, v in load_file(file).items()}
    if name in ("text_quick", "text_gelu"):
        for prefix in ("", "text_model."):
            tensors = {prefix + k: v for k, v in bare.items()}
            tensors[f"{prefix}embeddings.position_ids"] = np.arange(12)[None]
            save_file(tensors, file, metadata={"format": "pt"})
            compare(our_outputs(name, load_component(folder)), expected)


@towers
def test_round_trip_through_our_files_is_bit_identical(torch_tower, tmp_path, name):
    import torch

    theirs, folder = torch_tower
    save_component(load_component(folder), tmp_path / "ours")
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    expected, got = theirs.state_dict(), again.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    compare(torch_outputs(name, again.eval()), torch_outputs(name, theirs))


@pytest.mark.parametrize("name", ["text_gelu"])
def test_the_penultimate_layer_is_hidden_state_minus_two_normalized(torch_tower, name):
    import torch

    theirs, folder = torch_tower
    ids, mask = clip_ids()
    with torch.no_grad():
        states = theirs(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            output_hidden_states=True,
        ).hidden_states
        expected = theirs.final_layer_norm(states[-2]).numpy()
    ours = without_last_layers(load_component(folder), 1)
    assert ours.config.num_hidden_layers == 2
    assert relative_l2(our_outputs(name, ours)[0], expected) <= LIMIT


def test_each_tower_of_a_whole_clip_model(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import CLIPConfig, CLIPModel

    sections = {"text_config": CLIP["text_gelu"], "vision_config": CLIP["vision"]}
    model = CLIPModel(CLIPConfig(**sections, projection_dim=12))
    fill_torch(model)
    model.save_pretrained(tmp_path)
    ids, mask = clip_ids()
    with torch.no_grad():
        both = model(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            pixel_values=torch.from_numpy(pixels()),
        )
    text, plain, vision = (
        load_component(tmp_path, expect=f"CLIP{kind}")
        for kind in ("TextModelWithProjection", "TextModel", "VisionModelWithProjection")
    )
    normalize = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    hidden, embeds = our_outputs("text_projected", text)
    assert relative_l2(normalize(embeds), both.text_embeds.numpy()) <= LIMIT
    assert relative_l2(normalize(our_outputs("vision", vision)[1]), both.image_embeds) <= LIMIT
    np.testing.assert_array_equal(our_outputs("text_gelu", plain)[0], hidden)


def test_live_open_clip_and_back(tmp_path):
    torch = pytest.importorskip("torch")
    try:
        theirs = torch_open_clip()
    except ImportError as error:  # PackageNotFoundError is one
        pytest.skip(str(error))
    fill_torch(theirs)
    folder = tmp_path / "open_clip"
    folder.mkdir()
    own = {f"text.{k}": v.numpy() for k, v in theirs.state_dict().items()}
    save_file(own, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    (folder / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    ours = load_component(folder)
    compare(our_outputs("open_clip", ours), torch_outputs("open_clip", theirs))
    save_component(ours, tmp_path / "ours")
    again = load_file(tmp_path / "ours" / "open_clip_model.safetensors")
    unused = {k for k in own if "pooler" in k or "position_ids" in k}  # nothing reads these
    assert again.keys() == own.keys() - unused
    assert all(np.array_equal(again[key], own[key]) for key in again)
    tensors = {k.removeprefix("text."): torch.from_numpy(v) for k, v in again.items()}
    missing = theirs.load_state_dict(tensors, strict=False).missing_keys
    assert all("pooler" in key or "position_ids" in key for key in missing)
    assert (
        json.loads((tmp_path / "ours" / "open_clip_config.json").read_text())["model_cfg"][
            "text_cfg"
        ].items()
        >= OPEN_CLIP["model_cfg"]["text_cfg"].items()
    )
