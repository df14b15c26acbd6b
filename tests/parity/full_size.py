# SPDX-License-Identifier: Apache-2.0
"""Full-size components: their hub configs, inputs, and what torch computes with random weights."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from oracle import nhwc, seeded_input

from digseg_jax.models import functional

Arrays = tuple[np.ndarray, ...]
Inputs = dict[str, Arrays]  # name of a case -> arrays in torch's layout

# what the tests' conftest turns off, since small models run but once
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
_SD2_UNET = {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "upcast_attention": True,
    "sample_size": 96,
}
_L14 = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
_H14 = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}


@dataclasses.dataclass(frozen=True)
class Component:
    """A published component.

    Attributes:
        class_name: in diffusers or transformers, and here.
        config: what differs from the torch class's defaults.
        parameters: their number, None where no source states it.
        inputs: cases with their arrays in torch's layout.
        method: of our module.
    """

    class_name: str
    config: dict[str, Any]
    parameters: int | None
    inputs: Callable[[], Inputs]
    method: str = "__call__"


def _unet_inputs(width: int) -> Inputs:
    """Two latents with a timestep each; the second text is padded after 9 of 77 tokens."""
    text, mask = seeded_input("text", (2, 77, width)), np.arange(77)[None] < np.array([[77], [9]])
    return {
        f"{h}x{w}": (seeded_input("sample", (2, 4, h, w)), np.array([981, 17]), text, mask)
        for h, w in ((64, 64), (48, 80))
    }


def _images() -> Inputs:
    return {f"{h}x{w}": (seeded_input("image", (1, 3, h, w)),) for h, w in ((512, 512), (384, 640))}


def _latents() -> Inputs:
    return {
        f"{h}x{w}": (seeded_input("latent", (1, 4, h // 8, w // 8)),)
        for h, w in ((512, 512), (384, 640))
    }


def _clip_ids() -> Inputs:
    ids = np.random.RandomState(0).randint(1, 49406, (3, 77))
    ends = np.array([[76], [9], [2]])
    positions = np.arange(77)[None]
    ids = np.where(positions >= ends, 49407, ids)
    return {"masked": (ids, positions <= ends), "all": (ids,)}


def _bert_ids(length: int) -> Inputs:
    ids = np.random.RandomState(0).randint(1, 30522, (3, length))
    return {"masked": (ids, np.arange(length)[None] < np.array([[length], [9], [2]]))}


def _pixels() -> Inputs:
    return {"224x224": (seeded_input("pixels", (2, 3, 224, 224)),)}


_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
}
COMPONENTS = {
    "unet_sd15": Component(
        "UNet2DConditionModel", {"cross_attention_dim": 768}, 859_520_964, lambda: _unet_inputs(768)
    ),
    "unet_sd21": Component("UNet2DConditionModel", _SD2_UNET, 865_910_724, lambda: _unet_inputs(1024)),
    "vae_encode": Component("AutoencoderKL", _VAE, 83_653_863, _images, "encode"),
    "vae_decode": Component("AutoencoderKL", _VAE, 83_653_863, _latents, "decode"),
    "clip_l14_text": Component(
        "CLIPTextModel", _L14 | {"num_hidden_layers": 12, "eos_token_id": 2}, 123_060_480, _clip_ids
    ),
    "clip_l14_text_projected": Component(
        "CLIPTextModelWithProjection",
        _L14 | {"num_hidden_layers": 12, "eos_token_id": 2, "projection_dim": 768},
        None,
        _clip_ids,
    ),
    "clip_b16_text": Component("CLIPTextModel", {}, None, _clip_ids),
    "clip_h14_text": Component(
        "CLIPTextModel",
        _H14 | {"num_hidden_layers": 23, "hidden_act": "gelu", "eos_token_id": 2},
        None,
        _clip_ids,
    ),
    "clip_b16_vision": Component("CLIPVisionModelWithProjection", {"patch_size": 16}, None, _pixels),
    "clip_l14_vision": Component(
        "CLIPVisionModelWithProjection",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "projection_dim": 768,
        },
        None,
        _pixels,
    ),
    "bert_base": Component("BertModel", {}, None, lambda: _bert_ids(256)),
}


def write_torch(component: Component, folder: Path) -> Any:
    """Builds the torch model with non-trivial random weights and saves it as the hub has it."""
    import diffusers
    import torch
    import transformers

    if hasattr(diffusers, component.class_name):
        model = getattr(diffusers, component.class_name).from_config(component.config)
    else:
        model_class = getattr(transformers, component.class_name)
        model = model_class(model_class.config_class(**component.config))
    generator = torch.Generator().manual_seed(zlib.crc32(component.class_name.encode()))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                deviation = parameter[0].numel() ** -0.5
                parameter.normal_(0.0, deviation, generator=generator)
            else:  # norm scales lie around one, biases around zero; neither is constant
                parameter.normal_(float(key.endswith("weight")), 0.2, generator=generator)
    model.eval().save_pretrained(folder)
    return model


def torch_outputs(component: Component, model: Any) -> dict[str, Arrays]:
    """Case -> outputs, channels last as ours."""
    import torch

    found = {}
    with torch.no_grad():
        for name, arrays in component.inputs().items():
            out = _torch_call(component, model, [torch.from_numpy(a) for a in arrays])
            found[name] = tuple(nhwc(x.numpy()) if x.ndim == 4 else x.numpy() for x in out)
    return found


def _torch_call(component: Component, model: Any, arrays: list[Any]) -> tuple[Any, ...]:
    if component.class_name == "UNet2DConditionModel":
        return (model(*arrays[:3], encoder_attention_mask=arrays[3]).sample,)
    if component.method == "encode":
        posterior = model.encode(*arrays).latent_dist
        return posterior.mean, posterior.logvar
    if component.method == "decode":
        return (model.decode(*arrays).sample,)
    if component.class_name == "CLIPVisionModelWithProjection":
        out = model(*arrays)
        return out.last_hidden_state, out.image_embeds
    mask = {"attention_mask": arrays[1].long()} if len(arrays) > 1 else {}
    out = model(arrays[0], **mask)
    if component.class_name == "CLIPTextModelWithProjection":
        return out.last_hidden_state, out.text_embeds
    return out.last_hidden_state, out.pooler_output


def our_outputs(component: Component, model: nnx.Module) -> dict[str, Arrays]:
    """Case -> outputs of our model on the same inputs, as float32."""
    graphdef, params = functional.split(model)
    call = jax.jit(
        lambda p, *a: getattr(functional.merge(graphdef, p), component.method)(*a),
        compiler_options=OPTIMIZED,
    )
    found = {}
    for name, arrays in component.inputs().items():
        out = call(params, *(nhwc(a) if a.ndim == 4 else jnp.asarray(a) for a in arrays))
        parts = out if isinstance(out, tuple) else (out,)
        found[name] = tuple(np.asarray(x, np.float32) for x in parts)
    return found
