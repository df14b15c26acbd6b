# SPDX-License-Identifier: Apache-2.0
"""From a ConfigDict, with the command line's overrides, to a checked Config."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable
from typing import Any

import ml_collections

from digseg_jax.config.rules import check_combinations
from digseg_jax.config.schema import Config
from digseg_jax.errors import UserError, nearest


def default() -> ml_collections.ConfigDict:
    """A locked ConfigDict with every key at its default: the start of every config file."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config())).lock()


def parse(values: ml_collections.ConfigDict | dict[str, Any]) -> Config:
    """Returns the typed configuration.

    Raises:
      UserError: unknown key, wrong type, illegal value or impossible combination.
    """
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    config = _build(Config, values, "config")
    check_combinations(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Plain JSON-ready values; `parse` takes them back."""
    return _lists(dataclasses.asdict(config))


def with_estep(config: Config, text: str) -> Config:
    """The configuration with ensemble, steps and spacing of an E-Step such as "8x2".

    Raises:
      UserError: another form, or more steps than there are timesteps.
    """
    from digseg_jax.config.sampling import EStep  # imports JAX, which a wrong key need not

    estep = EStep.parse(text)
    values = to_dict(config)
    values["eval"] |= dataclasses.asdict(estep)
    return parse(values)


def check_key(path: str) -> None:
    """Raises UserError unless `path`, such as "config.train.steps", is a setting or a section."""
    node, done = Config, "config"
    for key in path.split(".")[1:]:
        key = key.split("[")[0]  # ml_collections reads config.eval.estep[0] too
        fields = [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
        if key not in fields:
            raise _no_such_key(done, key, fields)
        node, done = typing.get_type_hints(node)[key], f"{done}.{key}"


def _no_such_key(path: str, key: str, legal_keys: Iterable[str]) -> UserError:
    keys = list(legal_keys)
    legal_text = ", ".join(keys) or f"none below {path}"
    return UserError(f"{path}.{key}: no such key{nearest(key, keys)}; legal: {legal_text}")


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _build(cls: type, values: dict[str, Any], path: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            raise _no_such_key(path, key, fields)
    made = {}
    for key, value in values.items():
        made[key] = _value(hints[key], value, fields[key].metadata, f"{path}.{key}")
    return cls(**made)


def _value(hint: Any, value: Any, metadata: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"{path}={value!r}: expected a section of keys, got a single value")
        return _build(hint, value, path)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (tuple, list)):
            raise UserError(f"{path}={value!r}: expected a list")
        item = typing.get_args(hint)[0]
        return tuple(_value(item, v, {}, path) for v in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{path}={value!r}: expected {hint.__name__}, got {type(value).__name__}")
    allowed = metadata.get("legal")
    prefixes = metadata.get("prefixes", ())
    if allowed and value not in allowed and not value.startswith(prefixes or "\0"):
        names = [*allowed, *(f"{prefix}NAME" for prefix in prefixes)]
        raise UserError(f"{path}={value!r}: legal values are {', '.join(names)}")
    return value
