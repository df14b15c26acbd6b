# SPDX-License-Identifier: Apache-2.0
"""Reads a whole Stable Diffusion 1.x or 2.x from one file, such as v1-5-pruned-emaonly.safetensors.

Such files have the names of the program that trained them (latent-diffusion, "LDM") and no config.json:
every tensor gets diffusers' or transformers' name here, and the config follows from the shapes and from
what all models of the two families have in common.

    model.diffusion_model.*           U-Net
    first_stage_model.*               autoencoder
    cond_stage_model.transformer.*    text encoder of 1.x (transformers' CLIP)
    cond_stage_model.model.*          text encoder of 2.x (open_clip's)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from digseg_jax.errors import UserError
from digseg_jax.weights.safetensors_io import CONFIG_FILE, TensorInfo, tensor_infos

ENDING = ".safetensors"
SPLIT = (  # the tool for all other files, torch's diffusers
    "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER); then name FOLDER/unet, "
    "FOLDER/vae and FOLDER/text_encoder"
)
_HEAD_WIDTH = 64  # channels of a head: in the text encoders, and in the U-Nets of 2.x
_HEADS_1X = 8  # heads at every level of the U-Nets of 1.x
_OPEN_CLIP = "cond_stage_model.model."
_XL = ("conditioner.", "model.diffusion_model.label_emb.")  # Stable Diffusion XL has these
_VAE_ALONE = "decoder.up.0.block.0.conv1.weight"

_RESNET = (
    (r"in_layers\.0\.", "norm1."), (r"in_layers\.2\.", "conv1."),
    (r"emb_layers\.1\.", "time_emb_proj."), (r"out_layers\.0\.", "norm2."),
    (r"out_layers\.3\.", "conv2."), (r"skip_connection\.", "conv_shortcut."),
)  # fmt: skip
_UNET = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
    "middle_block.0": "mid_block.resnets.0", "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}  # fmt: skip
_VAE = (
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."), (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."), (r"\.norm_out\.", ".conv_norm_out."),
)  # fmt: skip
_TEXT_2X = (
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_final\.", "final_layer_norm."), (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."), (r"\.attn\.", ".self_attn."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."), (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)  # fmt: skip

Infos = dict[str, TensorInfo]


def read_part(file: Path, expect: tuple[str, ...]) -> tuple[dict[str, Any], Infos]:
    """Finds one component of a single-file checkpoint; no tensor is read.

    Args:
      file: the checkpoint.
      expect: class names, of which the first that such a file can contain is taken.

    Returns:
      The content that its config.json would have, and its tensors by diffusers' or transformers' names.

    Raises:
      UserError: another model's file, one without this component, or an incomplete one.
    """
    part = next((name for name in expect if name in _PARTS), None)
    if part is None:
        wanted = " or ".join(expect) or "say which part with expect"
        raise UserError(f"{file} can hold {', '.join(_PARTS)}; expected: {wanted}")

    # The names are those of the keys below the component's prefix.
    infos = tensor_infos([file])
    title, readers = _PARTS[part]
    for prefix, read in readers.items():
        inside = _below(infos, prefix)
        if inside and not any(key.startswith(_XL) for key in infos):
            try:
                values, tensors = read(inside)
            except KeyError as error:
                raise UserError(f"{file}: its {title} is not complete: no {error}") from error
            except (IndexError, ValueError) as error:
                raise UserError(f"{file}: its {title} has tensors of other shapes") from error
            return {"_class_name": part, **values}, tensors
    raise UserError(f"{file}: {_why_not(file, infos, title)}")


def is_second_generation(file: Path) -> bool:
    """True if a file's text encoder is that of Stable Diffusion 2.x."""
    return any(key.startswith(_OPEN_CLIP) for key in tensor_infos([file]))


def _why_not(file: Path, infos: Iterable[str], title: str) -> str:
    """Explains a file without a component that can be read, and says what to name instead."""
    if (file.parent / CONFIG_FILE).is_file():
        return f"weights of a folder with a {CONFIG_FILE}; name the folder, {file.parent}"
    if any(key.startswith(_XL) for key in infos):
        return "a Stable Diffusion XL or unCLIP; legal: 1.x and 2.x"
    if _VAE_ALONE in infos:
        return (
            "an autoencoder alone, which does not say the scale of its latents; name a folder with its "
            f"{CONFIG_FILE}, such as that of the hub's stabilityai/sd-vae-ft-mse"
        )
    return (
        f"no {title} of a Stable Diffusion 1.x or 2.x in it; weights of other kinds are read from "
        f"folders with a {CONFIG_FILE}"
    )


def _below(infos: Infos, prefix: str) -> Infos:
    """The tensors under a prefix by what follows it; each keeps its name in the file."""
    return {
        key.removeprefix(prefix): info._replace(name=key)
        for key, info in infos.items()
        if key.startswith(prefix)
    }


def _renamed(infos: Infos, rules: Iterable[tuple[str, str]]) -> Infos:
    """Tensors by new names; each rule is a pattern and its replacement, applied in order."""
    found: Infos = {}
    for key, info in infos.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        found[key] = info
    return found


def _count(keys: Iterable[str], prefix: str) -> int:
    """How many different numbers follow a prefix."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({match[1] for match in map(pattern.match, keys) if match})


def _widths(infos: Infos, prefix: str) -> list[int]:
    """Channels of every level, the highest resolution first."""
    levels = range(_count(infos, prefix))
    return [infos[f"{prefix}{level}.resnets.0.conv1.weight"].shape[0] for level in levels]


def _unet_tensors(infos: Infos) -> Infos:
    """The U-Net's tensors by diffusers' names, where its two lists of blocks are cut into levels."""
    modules = _UNET | _halves(infos)
    found: Infos = {}
    for key, info in infos.items():
        # A module's name is three or four words long, except outside of the blocks.
        words = key.split(".")
        names = (".".join(words[:n]) for n in (4, 3, 2))
        name = next((name for name in names if name in modules), None)
        rest = key if name is None else f"{modules[name]}{key.removeprefix(name)}"
        found[rest] = info
    return _renamed(found, [(rf"(resnets\.\d+\.){old}", rf"\g<1>{new}") for old, new in _RESNET])


def _unet(infos: Infos) -> tuple[dict[str, Any], Infos]:
    """The U-Net, with 4 inputs or those of a checkpoint that was widened."""
    found = _unet_tensors(infos)
    widths = _widths(found, "down_blocks.")
    attends = [f"down_blocks.{i}.attentions.0.norm.weight" in found for i in range(len(widths))]
    query = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"

    # Linear projections are the mark of 2.x, whose heads have one width; 1.x has one number of them.
    linear = len(found["mid_block.attentions.0.proj_in.weight"].shape) == 2
    return {
        "in_channels": found["conv_in.weight"].shape[1],
        "out_channels": found["conv_out.weight"].shape[0],
        "block_out_channels": widths,
        "down_block_types": [f"{'CrossAttn' * a}DownBlock2D" for a in attends],
        "up_block_types": [f"{'CrossAttn' * a}UpBlock2D" for a in reversed(attends)],
        "layers_per_block": _count(found, "down_blocks.0.resnets."),
        "cross_attention_dim": found[query].shape[1],
        "attention_head_dim": [w // _HEAD_WIDTH for w in widths] if linear else _HEADS_1X,
        "use_linear_projection": linear,
    }, found


def _halves(infos: Infos) -> dict[str, str]:
    """Modules of both halves of the U-Net, such as {"input_blocks.1.0": "down_blocks.0.resnets.0"}."""
    modules = {}
    level = layer = 0
    for i in range(1, _count(infos, "input_blocks.")):
        if f"input_blocks.{i}.0.op.weight" in infos:
            modules[f"input_blocks.{i}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            level, layer = level + 1, 0
        else:
            modules[f"input_blocks.{i}.0"] = f"down_blocks.{level}.resnets.{layer}"
            modules[f"input_blocks.{i}.1"] = f"down_blocks.{level}.attentions.{layer}"
            layer += 1

    # On the way up a level's last block has its upsampler too, behind the attention if there is one.
    level = layer = 0
    for i in range(_count(infos, "output_blocks.")):
        block, at = f"output_blocks.{i}", f"up_blocks.{level}"
        modules[f"{block}.0"] = f"{at}.resnets.{layer}"
        modules[f"{block}.1"] = f"{at}.attentions.{layer}"
        layer += 1
        for name in (f"{block}.1", f"{block}.2"):
            if f"{name}.conv.weight" in infos:
                modules[name] = f"{at}.upsamplers.0"
                level, layer = level + 1, 0
    return modules


def _vae(infos: Infos) -> tuple[dict[str, Any], Infos]:
    """The autoencoder, whose levels on the way up are numbered from the image."""
    last = _count(infos, "decoder.up.") - 1

    def from_below(match: re.Match[str]) -> str:
        return f"decoder.up_blocks.{last - int(match[1])}."

    # On the way up the levels are numbered from the image, in diffusers from below.
    upward = ((r"\.block\.", ".resnets."), (r"\.upsample\.", ".upsamplers.0."))
    found: Infos = {}
    for key, info in _renamed(infos, _VAE).items():
        turned = re.sub(r"^decoder\.up\.(\d+)\.", from_below, key)
        found |= {turned: info} if turned == key else _renamed({turned: info}, upward)

    return {
        "in_channels": found["encoder.conv_in.weight"].shape[1],
        "out_channels": found["decoder.conv_out.weight"].shape[0],
        "latent_channels": found["post_quant_conv.weight"].shape[1],
        "block_out_channels": _widths(found, "encoder.down_blocks."),
        "layers_per_block": _count(found, "encoder.down_blocks.0.resnets."),
    }, found


def _text_1x(infos: Infos) -> tuple[dict[str, Any], Infos]:
    """CLIP's text encoder under transformers' names, with its approximate GELU."""
    found = _renamed(infos, ((r"^text_model\.", ""),))
    return _text_config(found) | {"hidden_act": "quick_gelu"}, found


def _text_2x(infos: Infos) -> tuple[dict[str, Any], Infos]:
    """OpenCLIP's text encoder without its last layer: Stable Diffusion 2.x reads the one before.

    A file that was made from a pipeline has lost that layer already, and the projection behind it.
    """
    dropped = ["text_projection", "logit_scale", "attn_mask"]
    if any(key.startswith("text_projection") for key in infos):
        dropped.append(f"encoder.layers.{_count(infos, 'transformer.resblocks.') - 1}.")

    found: Infos = {}
    for key, info in _renamed(infos, _TEXT_2X).items():
        whole = re.fullmatch(r"(.*\.self_attn)\.in_proj_(weight|bias)", key)
        if key.startswith(tuple(dropped)):
            continue
        if whole is None:
            found[key] = info
            continue

        # Query, key and value are the thirds of one tensor.
        size = info.shape[0] // 3
        for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
            third = info._replace(shape=(size, *info.shape[1:]), rows=(i * size, (i + 1) * size))
            found[f"{whole[1]}.{name}.{whole[2]}"] = third
    return _text_config(found) | {"hidden_act": "gelu"}, found


def _text_config(infos: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Sizes of a text encoder."""
    vocabulary, width = infos["embeddings.token_embedding.weight"].shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": infos["encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _count(infos, "encoder.layers."),
        "num_attention_heads": max(width // _HEAD_WIDTH, 1),
        "max_position_embeddings": infos["embeddings.position_embedding.weight"].shape[0],
    }


_Reader = Callable[[Infos], tuple[dict[str, Any], Infos]]

# Class -> what to call it, and a reader for each prefix under which a file may have it.
_PARTS: dict[str, tuple[str, dict[str, _Reader]]] = {
    "UNet2DConditionModel": ("U-Net", {"model.diffusion_model.": _unet}),
    "AutoencoderKL": ("autoencoder", {"first_stage_model.": _vae}),
    "CLIPTextModel": (
        "text encoder",
        {"cond_stage_model.transformer.": _text_1x, _OPEN_CLIP: _text_2x},
    ),
}
