# SPDX-License-Identifier: Apache-2.0
"""Names for array types. Single letters are axes: b batch, h w space, c channels, l tokens, d width."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int, Integer, Real, UInt8

if TYPE_CHECKING:
    Array: TypeAlias = jax.Array
else:
    Array = jax.Array | np.ndarray  # JAX's functions take NumPy's arrays, and so do ours

Params: TypeAlias = dict[str, Any]  # pure nested dict; string keys, array leaves
Batch: TypeAlias = dict[str, Array]
Shapes: TypeAlias = dict[str, jax.ShapeDtypeStruct]  # of a batch without values

__all__ = [
    "Array",
    "Batch",
    "Bool",
    "DTypeLike",
    "Float",
    "Int",
    "Integer",
    "Params",
    "Real",
    "Shapes",
    "UInt8",
]
