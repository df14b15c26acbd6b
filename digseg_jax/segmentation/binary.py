# SPDX-License-Identifier: Apache-2.0
"""The `binary` codec: one black-and-white mask image for each query, whatever its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np

from digseg_jax.arraytypes import Array, Bool, Float, Int
from digseg_jax.config.schema import DataConfig
from digseg_jax.segmentation.codec import Codec, HostAutoencoder, require_prepared
from digseg_jax.segmentation.latent_probe import LatentProbe, fit_probe
from digseg_jax.segmentation.mask_loss import balanced_bce_and_dice, cell_shares, latent_evidence


class BinaryCodec(Codec):
    """Paints a query white on black, and reads it by the mean of the channels."""

    name: ClassVar[str] = "binary"
    one_by_one: ClassVar[bool] = True

    def __init__(self) -> None:
        self._probe: LatentProbe | None = None

    @classmethod
    def for_data(cls, data: DataConfig, classes: int | None = None) -> Self:
        return cls()

    @property
    def probe(self) -> LatentProbe:
        """The linear probe of this autoencoder's mask latents."""
        return require_prepared(self._probe, "BinaryCodec.probe")

    def cell_probe(self) -> LatentProbe:
        return self.probe

    def num_images(self, queries: int) -> int:
        return queries

    def texts(self, queries: Sequence[str]) -> tuple[str, ...]:
        return tuple(queries)

    def text_rows(self, query: Int[Array, "b q"]) -> Int[Array, "b q"]:
        return query

    def encode(
        self,
        label: Int[Array, "b h w"],
        query_class: Int[Array, "b q"] | Int[Array, "b q m"],
        drawn: Any = None,
    ) -> Float[Array, "b q h w 3"]:
        return encode_binary(label, query_class)

    def decode(self, image: Float[Array, "n h w 3"]) -> Float[Array, "n 1 h w"]:
        return decode_binary(image)[:, None]

    def read_latents(self, latents: Float[Array, "n q e h w c"]) -> Float[Array, "n q e h w"]:
        return self.probe(latents)

    def anchors(self, size: int) -> Float[Array, "2 s s 3"]:
        """An empty mask and a full one."""
        return jnp.broadcast_to(jnp.asarray([-1.0, 1.0])[:, None, None, None], (2, size, size, 3))

    def mask_loss(
        self,
        latent: Float[Array, "n h w c"],
        label: Int[Array, "b H W"],
        query_class: Int[Array, "b q"] | Int[Array, "b q m"],
        valid: Bool[Array, "n h w"],
        anchors: Float[Array, "2 h w c"] | None,
        drawn: Any = None,
    ) -> Float[Array, " n"]:
        """Class-balanced cross-entropy plus Dice of each cell's position between empty and full."""
        assert anchors is not None  # `anchors` is never None here
        masks = encode_binary(label, query_class)
        share = cell_shares(masks.reshape(-1, *masks.shape[2:]), label.shape[1] // latent.shape[1])
        return balanced_bce_and_dice(latent_evidence(latent, anchors), share, valid)

    def prepare(self, autoencoder: HostAutoencoder) -> None:
        if self._probe is None:
            self._probe = fit_probe(autoencoder.encode)

    def assume(self, latent_channels: int) -> None:
        self._probe = LatentProbe(np.zeros(latent_channels, np.float32), 0.0, 1.0)


def encode_binary(
    label: Int[Array, "b h w"], query_class: Int[Array, "b q"] | Int[Array, "b q m"]
) -> Float[Array, "b q h w 3"]:
    """Paints +1 where the label is the query's class, else -1, in three equal channels.

    query_class: with a third axis, the m ids that the class covers (nested classes), padded with ids
    that no label has.
    """
    if query_class.ndim == 2:
        query_class = query_class[..., None]
    covered = label[:, None, None] == query_class[..., None, None]
    mask = jnp.where(covered.any(axis=2), 1.0, -1.0)
    return jnp.broadcast_to(mask[..., None], (*mask.shape, 3))


def decode_binary(image: Float[Array, "*b h w 3"]) -> Float[Array, "*b h w"]:
    """Evidence for a query: mean of the channels, clipped to [-1, 1]; positive where it is seen."""
    return jnp.clip(image.mean(axis=-1), -1.0, 1.0)
