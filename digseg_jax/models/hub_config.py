# SPDX-License-Identifier: Apache-2.0
"""Base class of the model configs: converts a hub's `config.json` to a frozen dataclass and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from digseg_jax.errors import UserError


def _tuples(value: Any) -> Any:
    """The value with tuples for lists, at any depth: a frozen dataclass must be hashable."""
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


@dataclasses.dataclass(frozen=True)
class HubConfig:
    """Base of the configs, whose fields are named as in `config.json`.

    Attributes:
      CLASS_NAME: the model's class in diffusers or transformers.
      REQUIRED_VALUES: settings of which this port implements one value only.
    """

    CLASS_NAME: ClassVar[str] = ""
    REQUIRED_VALUES: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds the config from a parsed `config.json`; ignores keys that do not affect the arrays.

        Raises:
          UserError: a setting whose value this port does not implement.
        """
        for key, legal in cls.REQUIRED_VALUES.items():
            # Some files write null for "off" where others write false.
            accepted = (legal, None) if legal is False else (legal,)
            if key in values and _tuples(values[key]) not in accepted:
                raise UserError(
                    f"{cls.CLASS_NAME} config: {key}={values[key]!r} is not supported; legal: {legal!r}"
                )

        # Keys without a field do not affect the arrays: versions, paths, training settings.
        names = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: _tuples(v) for k, v in values.items() if k in names})

    def to_dict(self) -> dict[str, Any]:
        """The content of a `config.json` that diffusers or transformers reads."""
        # JSON has no tuples. Required values are written too: readers may have other defaults.
        values = dataclasses.asdict(self)
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return {"_class_name": self.CLASS_NAME, **self.REQUIRED_VALUES, **values}
