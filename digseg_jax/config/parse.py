# SPDX-License-Identifier: Apache-2.0
"""Parses a ConfigDict, with the command line's overrides, into a checked Config."""

from __future__ import annotations

import dataclasses
import math
import operator
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import ml_collections

from digseg_jax.config.renamed import hint
from digseg_jax.config.rules import check_combinations
from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import Config
from digseg_jax.errors import UserError, nearest


def default() -> ml_collections.ConfigDict:
    """A locked ConfigDict with every key at its default, from which every experiment file starts."""
    return ml_collections.ConfigDict(dataclasses.asdict(Config())).lock()


def parse(values: ml_collections.ConfigDict | dict[str, Any]) -> Config:
    """Returns the typed configuration.

    Raises:
      UserError: an unknown key, a wrong type, an illegal value or an impossible combination.
    """
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    config = _build(Config, values, "config")
    check_combinations(config)
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """Converts a configuration, or one of its sections, to values that JSON can store.

    `parse` reads those of a whole configuration.
    """
    return _lists(dataclasses.asdict(config))


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested dictionaries to one, with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def sampling_settings(text: str) -> dict[str, Any]:
    """The settings that an E-Step such as "8x2" stands for; raises UserError if it has another form."""
    return {f"eval.{name}": value for name, value in dataclasses.asdict(EStep.parse(text)).items()}


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """A copy of the configuration with other values of some keys, such as {"train.steps": 100}.

    Raises:
      UserError: unknown key, wrong type, illegal value or impossible combination.
    """
    values = to_dict(config)
    for key, value in settings.items():
        check_key(f"config.{key}")

        # Walk down to the key's section.
        *sections, name = key.split(".")
        node = values
        for section in sections:
            node = node[section]
        node[name] = value
    return parse(values)


def check_key(path: str) -> None:
    """Raises UserError unless `path`, such as "config.train.steps", is a setting or a section."""
    node, done = Config, "config"
    for key in path.split(".")[1:]:
        key = key.split("[")[0]  # ml_collections reads config.eval.sweep[0] too
        fields = [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
        if key not in fields:
            raise _no_such_key(done, key, fields)
        node, done = typing.get_type_hints(node)[key], f"{done}.{key}"


def _no_such_key(path: str, key: str, legal_keys: Iterable[str]) -> UserError:
    """The error for an unknown key: what it is called now, or the nearest and all legal ones."""
    if renamed := hint(f"{path}.{key}".removeprefix("config.")):
        return UserError(renamed)

    keys = list(legal_keys)
    legal_text = ", ".join(keys) or f"none below {path}"
    return UserError(f"{path}.{key}: no such key{nearest(key, keys)}; legal: {legal_text}")


def _lists(value: Any) -> Any:
    """The same values with tuples replaced by lists, because JSON has no tuples."""
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return [_lists(v) for v in value] if isinstance(value, (tuple, list)) else value


def _build(cls: type, values: dict[str, Any], path: str) -> Any:
    """An instance of a dataclass of the schema, from the values of its section.

    Args:
      cls: the dataclass; fields that `values` lacks keep their default.
      values: values by field name.
      path: the section's, such as "config.train", for the errors.

    Raises:
      UserError: an unknown key, a wrong type or an illegal value.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)

    for key in values:
        if key not in fields:
            raise _no_such_key(path, key, fields)

    made = {}
    for key, value in values.items():
        made[key] = _value(hints[key], value, fields[key].metadata, f"{path}.{key}")
    return cls(**made)


def _value(hint: Any, value: Any, about: Mapping[str, Any], path: str) -> Any:
    """A value, converted to its field's type and checked against its legal values and bounds.

    Args:
      hint: type of the field.
      value: what a file or the command line gives.
      about: the field's metadata, see `setting`.
      path: the key's, for the errors.

    Raises:
      UserError: a wrong type or an illegal value.
    """
    # A section, or a list of items of one type.
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise UserError(f"{path}={value!r}: expected a section of keys, got a single value")
        return _build(hint, value, path)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (tuple, list)):
            raise UserError(f"{path}={value!r}: expected a list")
        item, bounds = typing.get_args(hint)[0], {"bounds": about.get("bounds", {})}
        # A section among several is named by its place; a plain value tells itself.
        several = dataclasses.is_dataclass(item)
        paths = [f"{path}[{place}]" if several else path for place in range(len(value))]
        return tuple(_value(item, v, bounds, where) for v, where in zip(value, paths, strict=True))

    # A Literal is a string from a closed list.
    names, kind = about.get("names", ()), hint
    if typing.get_origin(hint) is Literal:
        names, kind = typing.get_args(hint), str

    # Whole numbers stand for floats, but bools never for numbers, though Python's bool is an int.
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{path}={value!r}: expected {kind.__name__}, got {type(value).__name__}")

    # Legal strings. A string never begins with NUL, so that without prefixes only the names are legal.
    prefixes = about.get("prefixes", ())
    if names and value not in names and not value.startswith(prefixes or "\0"):
        legal = ", ".join(name or "''" for name in (*names, *(f"{p}NAME" for p in prefixes)))
        raise UserError(f"{path}={value!r}: legal values are {legal}{nearest(value, names)}")

    # No setting has a meaning at infinity, and JSON has neither infinity nor nan.
    _check_bounds(value, about.get("bounds", {}), path)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{path}={value}: must be a finite number")
    return value


# Name of a bound -> comparison that a value must pass.
_HOLDS = {"at_least": operator.ge, "at_most": operator.le, "above": operator.gt, "below": operator.lt}


def _check_bounds(value: Any, bounds: Mapping[str, float], path: str) -> None:
    """Raises UserError that lists all bounds unless every one holds; NaN satisfies none."""
    if all(_HOLDS[name](value, bound) for name, bound in bounds.items()):
        return
    legal = " and ".join(f"{name.replace('_', ' ')} {bound:g}" for name, bound in bounds.items())
    raise UserError(f"{path}={value}: must be {legal}")
