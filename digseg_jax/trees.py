# SPDX-License-Identifier: Apache-2.0
"""Trees of parameters as nested dictionaries, and as flat ones by dotted path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from digseg_jax.arraytypes import Params


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"0": {"kernel": x}}} -> {"a.0.kernel": x}; `prefix` is put before every path."""
    flat: dict[str, Any] = {}
    for key, value in params.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, path + ".")
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """Inverse of `flatten` for paths without a prefix."""
    tree: Params = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        # Creates the folders of the path on the way down.
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
