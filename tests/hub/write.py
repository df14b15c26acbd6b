# SPDX-License-Identifier: Apache-2.0
"""Writes the miniature repositories: FOLDER/ORG/NAME/REVISION/..., with random weights.

The revision's name is quoted as in an URL. Besides `main`, Stable Diffusion 1.5 has the branches `fp16`
(the real one: half precision under the plain names), `half` (files of the fp16 variant alone), and
`sharded` and `sharded-half` (the U-Net in three files with an index).
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from digseg_jax import trees
from digseg_jax.models import functional
from digseg_jax.models.text.bert import BertConfig
from digseg_jax.models.text.open_clip import OpenClipTextConfig
from digseg_jax.models.text.tokenizer import CLIP_END
from digseg_jax.weights import catalog, keymap
from digseg_jax.weights.registry import COMPONENTS, component_of, component_of_config

from . import layouts, vocabulary

Tensors = dict[str, np.ndarray]
_PIPELINES = {
    "sd-1.5": layouts.SD15,
    "sd-2.1": layouts.SD21,
    "sd-2.1-base": layouts.SD21_BASE,
    "marigold": layouts.MARIGOLD,
    "marigold-1.0": layouts.MARIGOLD,
}
_SHARDS = 3
# the keys of an old AutoencoderKL's attention
_OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

# OpenAI's, by their names in the catalog: width of the text encoder, pixels of a patch
_CLIPS = {"clip-l14": (layouts.TEXT_WIDTH, 14), "clip-b16": (layouts.B16_TEXT_WIDTH, 16)}


def write_all(folder: Path) -> Path:
    """Writes every repository that the configs can name, 130 MB in some seconds; returns folder."""
    for name, layout in _PIPELINES.items():
        write_pipeline(folder, layout, name)
    _write_branches(folder)
    for name in _CLIPS:
        clip_folder(folder, name)
    _write_biomedclip(_revision(folder, "biomedclip"))
    _write_vaes(folder)
    return folder


def pipeline_folders(folder: Path, name: str = "sd-1.5") -> dict[str, str]:
    """{"vae", "unet", "text"} of a pipeline that `write_all` wrote, for configs without a server."""
    root = _revision(folder, name)
    parts = {"vae": "vae", "unet": "unet", "text": "text_encoder"}
    return {part: str(root / sub) for part, sub in parts.items()}


def clip_folder(folder: Path, name: str) -> Path:
    """Writes one of OpenAI's CLIPs, clip-l14 or clip-b16, below the folder, and returns its place."""
    root = _revision(folder, name)
    _write_clip(root, layouts.clip(*_CLIPS[name]))
    return root


def biomedclip_folder(folder: Path) -> Path:
    """Writes folder as `digseg_jax.tools.convert_weights biomedclip folder` does, and returns it.

    The hub has this model as a pickle only.
    """
    bert = BertConfig(
        hidden_size=layouts.BERT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=1,
        intermediate_size=4 * layouts.BERT_WIDTH,
        add_pooling_layer=False,
    )
    model = layouts.BIOMEDCLIP["model_cfg"]
    text = model["text_cfg"]
    config = OpenClipTextConfig(
        bert=bert,
        embed_dim=model["embed_dim"],
        projection=text["hf_proj_type"],
        pooler=text["hf_pooler_type"],
        context_length=text["context_length"],
        hf_model_name=text["hf_model_name"],
    )
    tensors = _tensors(config, "biomedclip")
    tensors["text.transformer.embeddings.position_ids"] = np.arange(512)[None]
    for key, shape in _TRUNK.items():
        tensors[f"visual.{key}"] = _draw(f"biomedclip/{key}", shape)
    tensors["logit_scale"] = np.float32(4.4)
    _save(tensors, folder / "open_clip_model.safetensors")
    _json(folder / "open_clip_config.json", layouts.BIOMEDCLIP)
    vocabulary.write_bert(folder)
    return folder


# the ends of a timm ViT, which the text tower's reader passes over
_TRUNK = {
    "trunk.cls_token": (1, 1, 32),
    "trunk.pos_embed": (1, 197, 32),
    "trunk.patch_embed.proj.weight": (32, 3, 16, 16),
    "trunk.patch_embed.proj.bias": (32,),
    "trunk.norm.weight": (32,),
    "trunk.norm.bias": (32,),
    "head.proj.weight": (32, 32),
}


def _revision(folder: Path, name: str, revision: str = "main") -> Path:
    return folder / catalog.hub_id(name) / revision


def write_pipeline(folder: Path, layout: Mapping[str, Any], name: str) -> None:
    """Writes a diffusers pipeline: both precisions, and the pickles that most repositories have too."""
    root = _revision(folder, name)
    _json(root / "model_index.json", layout["model_index.json"])
    _json(root / "scheduler" / "scheduler_config.json", layout["scheduler"])
    first = name == "sd-1.5"
    vocabulary.write_clip(root / "tokenizer", CLIP_END if first else "!")
    if "feature_extractor" in layout["model_index.json"]:
        _json(root / "feature_extractor" / "preprocessor_config.json", layouts.PREPROCESSOR)
    for part in ("unet", "vae", "text_encoder"):
        tensors = _of_json(layout[part], f"{name}/{part}")
        if part == "vae" and not name.startswith("marigold"):
            tensors = _old_attention(tensors)
        if part == "text_encoder" and first:
            tensors["text_model.embeddings.position_ids"] = np.arange(77)[None]
        stem = component_of(layout[part], name).stem
        _json(root / part / "config.json", layout[part])
        _save(tensors, root / part / f"{stem}.safetensors")
        _save(_half(tensors), root / part / f"{stem}.fp16.safetensors")
        _pickle(root / part / ("pytorch_model.bin" if part == "text_encoder" else f"{stem}.bin"))
    (root / "README.md").write_text(f"---\nlicense: creativeml-openrail-m\n---\n# {name}\n")


def _write_branches(folder: Path) -> None:
    """Other revisions of Stable Diffusion 1.5: the same pipeline, stored otherwise."""
    main = _revision(folder, "sd-1.5")
    for branch in ("fp16", "half", "sharded", "sharded-half"):
        root = _revision(folder, "sd-1.5", branch)
        for file in main.rglob("*"):
            if file.is_file() and file.suffix not in (".safetensors", ".bin"):
                _copy(file, root / file.relative_to(main))
        for part, stem in (
            ("unet", "diffusion_pytorch_model"),
            ("vae", "diffusion_pytorch_model"),
            ("text_encoder", "model"),
        ):
            half = main / part / f"{stem}.fp16.safetensors"
            whole = main / part / f"{stem}.safetensors"
            if branch.startswith("sharded") and part == "unet":
                variant = ".fp16" if branch == "sharded-half" else ""
                _write_shards(half if variant else whole, root / part, stem, variant)
            elif branch == "fp16":
                _copy(half, root / part / f"{stem}.safetensors")
            elif branch == "half":
                _copy(half, root / part / half.name)
            else:
                _copy(whole, root / part / whole.name)


def _write_shards(source: Path, folder: Path, stem: str, variant: str) -> None:
    """Shards as `save_pretrained(max_shard_size=...)` names them, and their index."""
    from safetensors.numpy import load_file

    tensors = load_file(source)
    keys = list(tensors)
    weight_map = {}
    for i in range(_SHARDS):
        name = f"{stem}{variant}-{i + 1:05}-of-{_SHARDS:05}.safetensors"
        own = keys[i::_SHARDS]
        _save({key: tensors[key] for key in own}, folder / name)
        weight_map |= dict.fromkeys(own, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _json(folder / f"{stem}.safetensors.index{variant}.json", index)


def _write_clip(root: Path, config: Mapping[str, Any]) -> None:
    """A whole CLIPModel of OpenAI's, with the buffers that old versions stored."""
    tensors: Tensors = {}
    for name in ("CLIPTextModelWithProjection", "CLIPVisionModelWithProjection"):
        part = COMPONENTS[name]
        tensors |= _tensors(part.config_class.from_dict(config), f"clip/{name}")
    positions = tensors["vision_model.embeddings.position_embedding.weight"].shape[0]
    tensors["text_model.embeddings.position_ids"] = np.arange(77)[None]
    tensors["vision_model.embeddings.position_ids"] = np.arange(positions)[None]
    tensors["logit_scale"] = np.float32(4.6)
    _save(tensors, root / "model.safetensors")
    _pickle(root / "pytorch_model.bin")
    _json(root / "config.json", config)
    _json(root / "preprocessor_config.json", layouts.PREPROCESSOR)
    vocabulary.write_clip(root, CLIP_END, fast=True)


def _write_biomedclip(root: Path) -> None:
    """BiomedCLIP as published: the pickle alone."""
    _pickle(root / "open_clip_pytorch_model.bin")
    _json(root / "open_clip_config.json", layouts.BIOMEDCLIP)
    vocabulary.write_bert(root)


def _write_vaes(folder: Path) -> None:
    """Autoencoders that are a repository of their own."""
    for name, config in (("taesd", layouts.TAESD), ("sd-vae-ft-mse", layouts.SD15["vae"])):
        root = _revision(folder, name)
        _save(_of_json(config, name), root / "diffusion_pytorch_model.safetensors")
        _json(root / "config.json", config)


def _of_json(config: Mapping[str, Any], seed: str) -> Tensors:
    """Tensors for a component's config.json."""
    component = component_of(config, seed)
    return _tensors(component.make_config(config, {}), seed)


def _tensors(config: Any, seed: str) -> Tensors:
    """Random tensors under the hub's keys for one of our configs."""
    return {key: _draw(f"{seed}/{key}", shape) for key, shape in _shapes(config).items()}


@functools.cache
def _shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """The hub's keys and shapes for one of our configs; tracing a model takes half a second."""
    component = component_of_config(config)
    _, params = functional.abstract(lambda: component.model_class(config, rngs=functional.FixedRngs()))
    return {
        component.key_prefix + keymap.hub_key(path): keymap.hub_shape(path, leaf.shape)
        for path, leaf in trees.flatten(params).items()
    }


def _draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor that is nowhere zero, one or constant and keeps the scale of activations."""
    rng = np.random.Generator(np.random.Philox(key=[0, zlib.crc32(name.encode())]))
    noise = rng.standard_normal(shape, np.float32)
    if len(shape) > 1:
        # as little as trained embeddings have, so that positions do not drown the tokens
        fan_in = 50.0 if "embedding" in name else np.sqrt(np.prod(shape[1:]))
        return noise / np.float32(fan_in)
    return np.float32(float(name.endswith("weight"))) + np.float32(0.1) * noise


def _old_attention(tensors: Tensors) -> Tensors:
    """An AutoencoderKL's tensors under the keys of diffusers before 0.17."""
    renamed = {}
    for key, tensor in tensors.items():
        if ".attentions." in key:
            for new, old in _OLD_NAMES.items():
                key = key.replace(f".{new}.", f".{old}.")
        renamed[key] = tensor
    return renamed


def _half(tensors: Tensors) -> Tensors:
    return {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in tensors.items()}


def _save(tensors: Tensors, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {key: np.asarray(tensor, order="C") for key, tensor in tensors.items()}
    save_file(arrays, path, metadata={"format": "pt"})


def _pickle(path: Path) -> None:
    """Stands for a pickle, which nothing here may open or even download."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"PK\x03\x04 not to be opened")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())


def _json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
