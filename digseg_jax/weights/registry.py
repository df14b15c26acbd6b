# SPDX-License-Identifier: Apache-2.0
"""Registry of hub components: their classes (imported when used) and their keys' spellings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from digseg_jax.errors import UserError
from digseg_jax.io.json_file import check_keys
from digseg_jax.weights.keymap import (
    BERT_RULES,
    CLIP_TEXT_PROJECTION_RULES,
    CLIP_TEXT_RULES,
    CLIP_VISION_RULES,
    OPEN_CLIP_RULES,
    UNET_RULES,
    VAE_RULES,
    KeyRules,
)
from digseg_jax.weights.safetensors_io import (
    CONFIG_FILE,
    DIFFUSERS_STEM,
    OPEN_CLIP_CONFIG_FILE,
    OPEN_CLIP_STEM,
    TRANSFORMERS_STEM,
    TensorInfo,
)


@dataclass(frozen=True)
class Component:
    """A kind of hub component.

    Attributes:
        name: class name, in the hub's config.json and in the module.
        module: below `digseg_jax.models`.
        config_name: its config class, in the same module.
        stem: name of the weight file without ending.
        rules: spellings of the keys.
        inferred: config field -> end of the key whose presence in the file makes the field True.
        key_prefix: put before every key on saving, so that older versions of other readers find it.
        config_file: name of the component's config file.
    """

    name: str
    module: str
    config_name: str
    stem: str
    rules: KeyRules
    inferred: tuple[tuple[str, str], ...] = ()
    key_prefix: str = ""
    config_file: str = CONFIG_FILE

    @property
    def model_class(self) -> type[Any]:
        """The NNX module class."""
        return getattr(import_module(f"digseg_jax.models.{self.module}"), self.name)

    @property
    def config_class(self) -> type[Any]:
        """The frozen dataclass that the model class takes."""
        return getattr(import_module(f"digseg_jax.models.{self.module}"), self.config_name)

    def make_config(self, values: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> Any:
        """Makes the config from config.json and what only weights show, such as a missing pooler."""
        # open_clip's config names another repository; sizes come from the tensors.
        if hasattr(self.config_class, "from_checkpoint"):
            shapes = {key: info.shape for key, info in infos.items()}
            return self.config_class.from_checkpoint(values, shapes)

        inferred = {f: any(k.endswith(end) for k in infos) for f, end in self.inferred}
        return self.config_class.from_dict({**values, **inferred})


_UNET = Component("UNet2DConditionModel", "unet", "UNetConfig", DIFFUSERS_STEM, UNET_RULES)
_VAE = Component("AutoencoderKL", "vae", "VaeConfig", DIFFUSERS_STEM, VAE_RULES)
_TINY_VAE = Component("AutoencoderTiny", "vae_tiny", "TinyVaeConfig", DIFFUSERS_STEM, KeyRules())
_BERT = Component(
    "BertModel",
    "text.bert",
    "BertConfig",
    TRANSFORMERS_STEM,
    BERT_RULES,
    inferred=(("add_pooling_layer", "pooler.dense.weight"),),
)
# Old versions of transformers need the prefix to read what is saved here.
_CLIP_TEXT = Component(
    "CLIPTextModel",
    "text.clip_text",
    "ClipTextConfig",
    TRANSFORMERS_STEM,
    CLIP_TEXT_RULES,
    key_prefix="text_model.",
)
_CLIP_TEXT_PROJECTION = Component(
    "CLIPTextModelWithProjection",
    "text.clip_text",
    "ClipTextProjectionConfig",
    TRANSFORMERS_STEM,
    CLIP_TEXT_PROJECTION_RULES,
)
_CLIP_VISION = Component(
    "CLIPVisionModelWithProjection",
    "text.clip_vision",
    "ClipVisionConfig",
    TRANSFORMERS_STEM,
    CLIP_VISION_RULES,
)
_OPEN_CLIP_TEXT = Component(
    "HFTextEncoder",
    "text.open_clip",
    "OpenClipTextConfig",
    OPEN_CLIP_STEM,
    OPEN_CLIP_RULES,
    key_prefix="text.",
    config_file=OPEN_CLIP_CONFIG_FILE,
)
_CLIP = (_CLIP_TEXT, _CLIP_TEXT_PROJECTION, _CLIP_VISION, _OPEN_CLIP_TEXT)
_ALL = (_UNET, _VAE, _TINY_VAE, _BERT, *_CLIP)
COMPONENTS = {c.name: c for c in _ALL}
# For classes with other heads: transformers' model_type names the encoder.
_BY_MODEL_TYPE = {"bert": "BertModel", "clip": "CLIPModel"}
# Checkpoints that contain more than one class: `expect` says which one is wanted.
_HOLDS = {
    "CLIPModel": ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPVisionModelWithProjection"),
    "CLIPTextModelWithProjection": ("CLIPTextModelWithProjection", "CLIPTextModel"),
    # An export's own class for torch, defined in a file beside the weights; here a plain U-Net.
    "DigsegUNet2DConditionModel": ("UNet2DConditionModel",),
}


def component_of(config: Mapping[str, Any], source: str, expect: tuple[str, ...] = ()) -> Component:
    """Reads the class from a hub config: `_class_name`, else `architectures`, else `model_type`.

    Args:
        config: parsed config.json or open_clip_config.json.
        source: folder, for the error.
        expect: acceptable classes, of which the first that the checkpoint contains is taken; empty: the
          class that the config names.

    Raises:
        UserError: an unknown class, none of those expected, or several and none expected.
    """
    found = _class_of(config, source)
    held = _HOLDS.get(found, (found,))

    # Several classes may be acceptable, and the checkpoint may contain several.
    if expect:
        chosen = next((name for name in expect if name in held), None)
        if chosen is None:
            raise UserError(f"{source} holds a {found}; expected {' or '.join(expect)}")
        return COMPONENTS[chosen]

    if len(held) > 1 and found not in COMPONENTS:
        raise UserError(f"{source} holds a {found}; say which part with expect={' or '.join(held)}")
    return COMPONENTS[found if found in COMPONENTS else held[0]]


def is_exactly(component: Component, config: Mapping[str, Any], source: str) -> bool:
    """True if a folder's config.json declares this very class: its files can be copied unchanged."""
    return component.config_file == CONFIG_FILE and _class_of(config, source) == component.name


def _class_of(config: Mapping[str, Any], source: str) -> str:
    """Name of the class that a hub config declares; it may contain others (`_HOLDS`).

    Raises:
      UserError: no known class.
    """
    _check_types(config, source)

    # open_clip's config has no class name: only the encoders that it takes from transformers are known.
    if "model_cfg" in config:
        if "hf_model_name" not in config["model_cfg"].get("text_cfg", {}):
            raise UserError(
                f"{source}/{OPEN_CLIP_CONFIG_FILE} names open_clip's own text tower; take the "
                "checkpoint in transformers' layout"
            )
        return _OPEN_CLIP_TEXT.name

    named = [config.get("_class_name"), *(config.get("architectures") or [])]
    for name in named:
        if name in COMPONENTS or name in _HOLDS:
            return name

    # The type names the encoder of classes with other heads, such as BertForMaskedLM.
    model_type = config.get("model_type")
    if model_type in _BY_MODEL_TYPE:
        return _BY_MODEL_TYPE[model_type]

    found = next((n for n in (*named, model_type) if n), None)
    raise UserError(f"{source}/config.json names the class {found!r}; legal: {', '.join(COMPONENTS)}")


def _check_types(config: Mapping[str, Any], source: str) -> None:
    """Raises UserError for entries that name the class and are of another type than the hub's."""
    kinds: dict[str, type] = {
        "_class_name": str, "architectures": list, "model_type": str, "model_cfg": dict,
    }  # fmt: skip
    names = config.get("architectures") or []
    try:
        check_keys(config, {k: kind for k, kind in kinds.items() if config.get(k) is not None})
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"'architectures' is {names!r:.60}, expected names")
        if "model_cfg" in config:
            check_keys({"text_cfg": {}, **config["model_cfg"]}, {"text_cfg": dict})
    except ValueError as error:
        raise UserError(f"{source}: the config's {error}") from error


def component_of_config(config: Any) -> Component:
    """The component whose config class `config` is an instance of."""
    # By name, because the classes are imported only when used.
    for component in COMPONENTS.values():
        if type(config).__name__ == component.config_name:
            return component
    raise TypeError(f"no component has a config of type {type(config).__name__}")
