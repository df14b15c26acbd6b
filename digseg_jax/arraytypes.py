# SPDX-License-Identifier: Apache-2.0
"""Names for array types. Single letters are axes: b batch, h w space, c channels, l tokens, d width."""

from __future__ import annotations

from typing import Any, TypeAlias

from jax import Array
from jaxtyping import Bool, Float, Int, UInt8

Params: TypeAlias = dict[str, Any]  # pure nested dict; string keys, array leaves
Batch: TypeAlias = dict[str, Array]

__all__ = ["Array", "Batch", "Bool", "Float", "Int", "Params", "UInt8"]
