# SPDX-License-Identifier: Apache-2.0
"""Settings of other programs' models: known ones are taken, harmless ones ignored, the rest refused."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
from hub import layouts
from tiny import one_line

from digseg_jax.errors import UserError
from digseg_jax.models.text.open_clip import OpenClipTextConfig
from digseg_jax.weights.registry import component_of

REAL = {
    f"{name}/{part}": layout[part]
    for name, layout in {
        "sd15": layouts.SD15, "sd21": layouts.SD21, "marigold": layouts.MARIGOLD
    }.items()
    for part in ("unet", "vae", "text_encoder")
}  # fmt: skip
UNET, VAE, TEXT = (REAL[f"marigold/{part}"] for part in ("unet", "vae", "text_encoder"))
EMA = {"decay": 0.9999, "inv_gamma": 1.0, "min_decay": 0.0, "optimization_step": 100, "power": 0.7,
       "update_after_step": 0, "use_ema_warmup": False}  # fmt: skip


def read(values, expect=()):
    return component_of(values, "folder", expect).make_config(values, {})


@pytest.mark.parametrize("name", [*REAL, "taesd"])
def test_the_files_of_the_hub_are_taken(name):
    config = read(REAL.get(name, layouts.TAESD))
    assert read(config.to_dict()) == config  # and so is what is written here


@pytest.mark.parametrize("patch_size", [14, 16])
def test_whole_clip_models_are_taken(patch_size):
    values = layouts.clip(32, patch_size)
    assert read(values, ("CLIPTextModel",)).max_position_embeddings == 77
    assert read(values, ("CLIPVisionModelWithProjection",)).patch_size == patch_size


def test_what_averaging_leaves_in_a_config_is_harmless():
    assert read(UNET | EMA) == read(UNET)


@pytest.mark.parametrize(
    ("values", "key", "value"),
    [
        (UNET, "timestep_post_act", "silu"),
        (UNET, "cross_attention_norm", "layer_norm"),
        (UNET, "resnet_skip_time_act", True),
        (UNET, "resnet_out_scale_factor", 1.5),
        (UNET, "attention_type", "gated"),
        (UNET, "mid_block_only_cross_attention", True),
        (UNET, "time_embedding_dim", 512),
        (UNET, "reverse_transformer_layers_per_block", [1, 2]),
        (UNET, "of_a_later_version", 1),
        (VAE, "latents_mean", [0.1, 0.2, 0.3, 0.4]),
        (VAE, "latents_std", [1.0] * 4),
        (VAE, "shift_factor", 0.1159),
        (VAE, "down_block_types", ["AttnDownEncoderBlock2D"] * 4),
        (TEXT, "pruned_heads", {"0": [1]}),
        (TEXT, "rope_theta", 1e4),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_may_change_the_numbers_is_refused_by_name(values, key, value):
    with pytest.raises(UserError) as caught:
        read(values | {key: value})
    assert key in one_line(caught.value)
    if key not in ("down_block_types", "resnet_out_scale_factor", "attention_type"):
        read(values | {key: None})  # off


@pytest.mark.parametrize(
    ("values", "key", "value"),
    [
        (UNET, "layers_per_block", 10**7),
        (UNET, "block_out_channels", [320] * 10**4),
        (UNET, "block_out_channels", [320, 640, 1280, 10**9]),
        (UNET, "block_out_channels", []),
        (UNET, "block_out_channels", [16, 32, 32, 33]),
        (UNET, "norm_num_groups", 0),
        (UNET, "attention_head_dim", 0),
        (UNET, "attention_head_dim", [2, 4, 4, 5]),
        (UNET, "in_channels", True),
        (UNET, "in_channels", "4"),
        (UNET, "norm_eps", float("nan")),
        (UNET, "down_block_types", [1, 2, 3, 4]),
        (VAE, "layers_per_block", 10**7),
        (VAE, "scaling_factor", [1]),
        (TEXT, "num_hidden_layers", 10**7),
        (TEXT, "num_attention_heads", 0),
        (TEXT, "vocab_size", 10**10),
        (layouts.TAESD, "num_encoder_blocks", [1, 3, 3, 10**7]),
    ],
    ids=lambda x: str(x)[:20] if not isinstance(x, dict) else "",
)
def test_wrong_types_and_sizes_are_one_line_before_any_work(values, key, value):
    with pytest.raises(UserError) as caught:
        read(values | {key: value})
    assert f"{key}=" in one_line(caught.value) and "legal" in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("", "embed_dim", "512"), ("text_cfg", "context_length", None), ("text_cfg", "ls_init_value", 0.1),
     ("text_cfg", "hf_model_name", 3)],
)  # fmt: skip
def test_settings_of_open_clip_are_judged_too(section, key, value):
    model = layouts.BIOMEDCLIP["model_cfg"]
    model = model | ({"text_cfg": model["text_cfg"] | {key: value}} if section else {key: value})
    with pytest.raises(UserError, match=key):
        OpenClipTextConfig.from_checkpoint({"model_cfg": model}, {})
    with pytest.raises(UserError, match="no key 'text.transformer"):  # the real one: up to the weights
        OpenClipTextConfig.from_checkpoint(layouts.BIOMEDCLIP, {})


PLACES = {  # classes of diffusers whose files are read here
    "UNet2DConditionModel": "models/unets/unet_2d_condition.py",
    "AutoencoderKL": "models/autoencoders/autoencoder_kl.py",
    "AutoencoderTiny": "models/autoencoders/autoencoder_tiny.py",
}
CONFIGS = {  # and of transformers
    "CLIPTextModel": "CLIPTextConfig",
    "CLIPTextModelWithProjection": "CLIPTextConfig",
    "CLIPVisionModelWithProjection": "CLIPVisionConfig",
    "BertModel": "BertConfig",
}


def installed_defaults(name: str) -> dict[str, Any]:
    """What the installed library writes into config.json if nothing is chosen; no torch is needed."""
    if name in CONFIGS:
        import transformers

        return getattr(transformers, CONFIGS[name])().to_dict() | {"architectures": [name]}

    # diffusers imports torch with its models: only the text of the constructor is read.
    spec = importlib.util.find_spec("diffusers")
    assert spec is not None and spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / PLACES[name]).read_text())
    (model,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name]
    (init,) = [n for n in model.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    keys = [argument.arg for argument in init.args.args][1:]
    values = [ast.literal_eval(default) for default in init.args.defaults]
    return {"_class_name": name, **dict(zip(keys, values, strict=True))}


@pytest.mark.parametrize("name", [*PLACES, *CONFIGS])
def test_what_the_installed_libraries_write_by_default_is_taken(name):
    values = installed_defaults(name)
    kind = type(read(values))
    known = {field.name for field in dataclasses.fields(kind)}
    known |= kind.HARMLESS | {"_class_name", "architectures"}

    # Any other value of a setting that is neither read nor harmless may change the numbers.
    judged = [key for key in values if key not in known and not key.startswith("_")]
    for key in judged:
        default = values[key]
        other: Any = "another" if isinstance(default, str) else 3.5
        with pytest.raises(UserError, match=key):
            read(values | {key: not default if isinstance(default, bool) else other})
    assert len(judged) > 2 or name in CONFIGS
