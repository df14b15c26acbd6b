# SPDX-License-Identifier: Apache-2.0
"""The result of every text encoder, whatever its architecture."""

from __future__ import annotations

from typing import NamedTuple

from digseg_jax.arraytypes import Array, Float


class TextOutput(NamedTuple):
    """Token features for cross-attention and one vector per text.

    Attributes:
        last_hidden_state: [b, l, d] features of every token, padding included: mask it.
        pooled: [b, d] one vector per text; each encoder's docstring says how it is made.
    """

    last_hidden_state: Float[Array, "b l d"]
    pooled: Float[Array, "b d"]
