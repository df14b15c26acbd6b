# SPDX-License-Identifier: Apache-2.0
"""Which class a hub component is, and how its keys read. Classes are imported when asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from digseg_jax.errors import UserError
from digseg_jax.weights.keymap import BERT_RULES, UNET_RULES, VAE_RULES, KeyRules
from digseg_jax.weights.safetensors_io import DIFFUSERS_STEM, TRANSFORMERS_STEM


@dataclass(frozen=True)
class Component:
    """A kind of hub component.

    Attributes:
        name: class name in the hub's config.json and in our module.
        module: below `digseg_jax.models`.
        config_name: its config class, in the same module.
        stem: name of the weight file without ending.
        rules: spellings of the keys.
        inferred: config field -> end of the key whose presence in the file makes the field True.
    """

    name: str
    module: str
    config_name: str
    stem: str
    rules: KeyRules
    inferred: tuple[tuple[str, str], ...] = ()

    @property
    def model_class(self) -> type:
        """The NNX module class."""
        return getattr(import_module(f"digseg_jax.models.{self.module}"), self.name)

    @property
    def config_class(self) -> type:
        """The frozen dataclass that the model class takes."""
        return getattr(import_module(f"digseg_jax.models.{self.module}"), self.config_name)

    def make_config(self, values: Mapping[str, Any], keys: Iterable[str]) -> Any:
        """Config from config.json plus what only the file's keys tell, such as a missing pooler."""
        present = list(keys)
        inferred = {f: any(k.endswith(end) for k in present) for f, end in self.inferred}
        return self.config_class.from_dict({**values, **inferred})


_UNET = Component("UNet2DConditionModel", "unet", "UNetConfig", DIFFUSERS_STEM, UNET_RULES)
_VAE = Component("AutoencoderKL", "vae", "VaeConfig", DIFFUSERS_STEM, VAE_RULES)
_BERT = Component(
    "BertModel",
    "bert",
    "BertConfig",
    TRANSFORMERS_STEM,
    BERT_RULES,
    inferred=(("add_pooling_layer", "pooler.dense.weight"),),
)
COMPONENTS = {c.name: c for c in (_UNET, _VAE, _BERT)}
_BY_MODEL_TYPE = {"bert": _BERT}


def component_of(config: Mapping[str, Any], source: str) -> Component:
    """Reads the class off a hub config: `_class_name`, else `architectures`, else `model_type`.

    Raises:
        UserError: none of them names a class that we have; `source` is named in it.
    """
    named = [config.get("_class_name"), *(config.get("architectures") or [])]
    for name in named:
        if name in COMPONENTS:
            return COMPONENTS[name]
    model_type = config.get("model_type")
    if model_type in _BY_MODEL_TYPE:  # such as BertForMaskedLM, whose encoder we take
        return _BY_MODEL_TYPE[model_type]
    found = next((n for n in (*named, model_type) if n), None)
    raise UserError(
        f"{source}/config.json names the class {found!r}; legal: {', '.join(COMPONENTS)}"
    )


def component_of_config(config: Any) -> Component:
    """The component whose config class `config` is an instance of."""
    for component in COMPONENTS.values():
        if type(config).__name__ == component.config_name:
            return component
    raise TypeError(f"no component has a config of type {type(config).__name__}")
