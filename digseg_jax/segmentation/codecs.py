# SPDX-License-Identifier: Apache-2.0
"""Between label maps and the mask images that the VAE encodes. `binary`: one query, one mask."""

from __future__ import annotations

import jax.numpy as jnp

from digseg_jax.arraytypes import Array, Bool, Float, Int


def encode_binary(
    label: Int[Array, "b h w"], query_class: Int[Array, "b q"] | Int[Array, "b q m"]
) -> Float[Array, "b q h w 3"]:
    """+1 where the label is the queried class, else -1, in three equal channels.

    With a third axis, +1 where it is one of the m ids that the class covers (nested classes).
    """
    if query_class.ndim == 2:
        query_class = query_class[..., None]
    covered = label[:, None, None] == query_class[..., None, None]
    mask = jnp.where(covered.any(axis=2), 1.0, -1.0)
    return jnp.broadcast_to(mask[..., None], (*mask.shape, 3))


def decode_binary(image: Float[Array, "*b h w 3"]) -> Float[Array, "*b h w"]:
    """The evidence for a query: channel mean clipped to [-1, 1], positive where the query is seen."""
    return jnp.clip(image.mean(axis=-1), -1.0, 1.0)


def latent_validity(label: Int[Array, "b h w"], factor: int) -> Bool[Array, "b h2 w2"]:
    """True for latent cells none of whose factor x factor pixels carries the ignore label, -1."""
    b, h, w = label.shape
    cells = label.reshape(b, h // factor, factor, w // factor, factor)
    return (cells >= 0).all(axis=(2, 4))
