# SPDX-License-Identifier: Apache-2.0
"""The `prompted` codec: one mask image shows any named classes, each in the color its name is given.

The context of an image is a list of up to K names, one token each: the text's sentence feature, marked
with a color. The U-Net paints every named class in its color, and what nobody named in one more color,
the background's. The colors are a fixed set, chosen for the autoencoder as a palette's are; which name
gets which color is drawn for every training example, so that the network must read it from the context.
In prediction every member of an ensemble has the colors shifted by one place: what lies between two
colors looks like a third, and that is another name's in every member.
Ours: the paper says neither how its colored masks are asked for nor how they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from digseg_jax.arraytypes import Array, Bool, Float, Int
from digseg_jax.config.codecs import QUERY_FORMS
from digseg_jax.config.schema import DataConfig
from digseg_jax.data.queries import NOWHERE
from digseg_jax.errors import UserError
from digseg_jax.segmentation.codec import HostAutoencoder
from digseg_jax.segmentation.mask_loss import balanced_ce_and_dice, class_shares
from digseg_jax.segmentation.palette import (
    MAX_CLASSES,
    ColorCodec,
    Palette,
    build_palette,
    decode_palette,
    encode_palette,
    flat_latents,
    stored_rows,
)

DRAWS = 0x636F6C  # folded into an example's key, so that its noise does not depend on its colors


class Drawn(NamedTuple):
    """What is drawn for b training examples with K names each.

    colors: int [b, K], the color of each name.
    named: bool [b, K], False for a name that is left out.
    """

    colors: Int[Array, "b k"]
    named: Bool[Array, "b k"]


class PromptedCodec(ColorCodec):
    """Paints any named classes into a single mask image and reads each by its color.

    Args:
      names: K, the most names of one image; larger vocabularies are split into groups of K.
      dropout: share of training examples that keep only a random number of their names, so that
        some classes in the image are unnamed.
    """

    name: ClassVar[str] = "prompted"
    background: ClassVar[bool] = True
    redrawn: ClassVar[bool] = True
    recolored: ClassVar[bool] = True
    pooled: ClassVar[bool] = QUERY_FORMS[name].pooled

    def __init__(self, names: int, dropout: float = 0.0):
        super().__init__()
        self.names, self.dropout = names, dropout

    @classmethod
    def for_data(cls, data: DataConfig, classes: int | None = None) -> Self:
        if data.num_queries >= MAX_CLASSES:
            raise UserError(
                f"config.data.num_queries={data.num_queries}: config.model.codec='prompted' has a "
                f"color for each name; legal 1 to {MAX_CLASSES - 1}"
            )
        return cls(data.num_queries, data.name_dropout)

    @classmethod
    def mark_width(cls, latent_channels: int) -> int:
        """Red, green and blue of the token's color, and its latent."""
        return 3 + latent_channels

    def marks(self) -> Float[np.ndarray, "k m"]:
        """Color and latent of each name, in the order of the palette."""
        return np.concatenate([self.palette.colors, self.color_latents], axis=1)[: self.names]

    def texts(self, queries: Sequence[str]) -> tuple[str, ...]:
        return tuple(queries)

    def text_rows(self, query: Int[Array, "b q"]) -> Int[Array, "b q"]:
        return query

    def slots(self, count: int) -> int:
        """K, whatever the number of queries: one program serves every vocabulary."""
        return self.names

    def asks_for_all(self, classes: int, limit: int) -> bool:
        """Only of a vocabulary that one mask image can show."""
        return classes <= min(limit, self.names)

    def gate_limit(self, limit: int) -> int:
        """As many as one mask image can show."""
        return min(limit, self.names)

    def hide_empty(self, mask: Bool[np.ndarray, "t l"], asked: int) -> Bool[np.ndarray, "t l"]:
        """Hides the texts of empty places: a name must not have two colors."""
        return mask & (np.arange(len(mask)) < asked)[:, None]

    def draw(self, keys: Array, query_class: Int[Array, "b q"] | Int[Array, "b q m"]) -> Drawn:
        """Draws the colors of each example's names, and which names are left out."""
        classes = query_class.reshape(*query_class.shape[:2], -1)
        return jax.vmap(lambda key, own: draw_names(key, own, self.dropout))(keys, classes)

    def encode(
        self,
        label: Int[Array, "b h w"],
        query_class: Int[Array, "b q"] | Int[Array, "b q m"],
        drawn: Drawn | None = None,
    ) -> Float[Array, "b 1 h w 3"]:
        colors = self._colors(label, query_class, drawn)
        return encode_palette(colors, jnp.asarray(self.palette.colors))[:, None]

    def context(
        self, tokens: Float[Array, "b t 1 d"], mask: Bool[Array, "b t 1"], drawn: Drawn | None = None
    ) -> tuple[Float[Array, "b 1 t d2"], Bool[Array, "b 1 t"]]:
        """Joins the names of an image to one list of tokens, each followed by its color's features."""
        drawn = self._drawn(drawn, *mask.shape[:2])
        marks = jnp.asarray(self.marks(), tokens.dtype)[drawn.colors]
        marked = jnp.concatenate([tokens[:, :, 0], marks], axis=-1)
        return marked[:, None], (mask[:, :, 0] & drawn.named)[:, None]

    def member_context(
        self, tokens: Float[Array, "b t 1 d"], mask: Bool[Array, "b t 1"], member: int | Array
    ) -> tuple[Float[Array, "b 1 t d2"], Bool[Array, "b 1 t"]]:
        """Place p has color p + member, counted around."""
        images, places = mask.shape[:2]
        colors = jnp.broadcast_to((jnp.arange(places) + member) % self.names, (images, places))
        return self.context(tokens, mask, Drawn(colors, jnp.ones((images, places), bool)))

    def in_places(
        self, evidence: Float[Array, "n k e h w"], first: int | Array
    ) -> Float[Array, "n k e h w"]:
        """Evidence comes in the order of the colors, which differs between members."""
        members = first + jnp.arange(evidence.shape[2])
        colors = (jnp.arange(self.names)[:, None] + members) % self.names  # [k, e]
        return jnp.take_along_axis(evidence, colors[None, :, :, None, None], axis=1)

    def decode(self, image: Float[Array, "n h w 3"]) -> Float[Array, "n k h w"]:
        """Evidence of the K names, in the order of the colors, against the background."""
        return against_last(decode_palette(image, jnp.asarray(self.palette.prototypes)))

    def read_latents(self, latents: Float[Array, "n 1 e h w c"]) -> Float[Array, "n k e h w"]:
        """Reads each cell by its distances to the colors' latents, in the units of `decode`."""
        return against_last(jnp.moveaxis(self.color_logits(latents[:, 0]), -1, 1)) / self.scale

    def mask_loss(
        self,
        latent: Float[Array, "n h w c"],
        label: Int[Array, "b H W"],
        query_class: Int[Array, "b q"] | Int[Array, "b q m"],
        valid: Bool[Array, "n h w"],
        anchors: Float[Array, "a h w c"] | None,
        drawn: Drawn | None = None,
    ) -> Float[Array, " n"]:
        """Balanced cross-entropy plus Dice over the distances to the colors' latents."""
        colors = self._colors(label, query_class, drawn)
        shares = class_shares(colors, label.shape[1] // latent.shape[1], self.names + 1)
        return balanced_ce_and_dice(self.color_logits(latent), shares, valid)

    def prepare(self, autoencoder: HostAutoencoder) -> None:
        # What was restored with trained weights stays as it is.
        if self._palette is None:
            chosen = build_palette(self.names + 1, autoencoder.round_trip, autoencoder.encode)
            latents = flat_latents(chosen.colors, autoencoder)
            order = neutral_last(latents)
            self._palette = Palette(chosen.colors[order], chosen.prototypes[order], chosen.sigma)
            # Rounded: another machine's last digits must not be another input of the network.
            self._latents = latents[order].round(4)

    def assume(self, latent_channels: int) -> None:
        self.assume_colors(self.names + 1, latent_channels)

    def state(self) -> dict[str, Any]:
        return self.palette.to_dict() | {"latents": self.color_latents.tolist()}

    def restore(self, state: dict[str, Any]) -> None:
        if not state:
            raise UserError("missing; these weights were not trained with the prompted codec")

        # The weights know how many names they were trained with.
        palette, latents = Palette.from_dict(state), stored_rows(state, "latents")
        if len(latents) != len(palette.colors) or len(latents) < 2:
            raise UserError(f"damaged: {len(palette.colors)} colors, but {len(latents)} latents")
        self._palette, self._latents, self.names = palette, latents, len(latents) - 1

    def _drawn(self, drawn: Drawn | None, images: int, names: int) -> Drawn:
        """What was drawn; by default, as in prediction, every name in the color of its place."""
        if drawn is not None:
            return drawn
        colors = jnp.broadcast_to(jnp.arange(names), (images, names))
        return Drawn(colors, jnp.ones((images, names), bool))

    def _colors(
        self,
        label: Int[Array, "b h w"],
        query_class: Int[Array, "b q"] | Int[Array, "b q m"],
        drawn: Drawn | None,
    ) -> Int[Array, "b h w"]:
        """The color of every pixel; K for the background, -1 where the label is ignored."""
        drawn = self._drawn(drawn, *query_class.shape[:2])
        return color_map(label, query_class, drawn, background=self.names)


def draw_names(key: Array, classes: Int[Array, "k m"], dropout: float) -> Drawn:
    """Draws the colors of one example's names, and which of them are left out.

    classes: ids that each name covers. Names of one class beyond the first are left out: a class must
      not have two colors. Names of other data sets, `NOWHERE`, stand for different classes.
    """
    count = len(classes)
    color_key, order_key, number_key = jax.random.split(jax.random.fold_in(key, DRAWS), 3)

    # Names that repeat the class of an earlier one.
    same = (classes[:, None] == classes[None]).all(axis=-1) & (classes != NOWHERE).any(axis=-1)
    repeated = jnp.tril(same, -1).any(axis=-1)
    different = count - repeated.sum()

    # A random order with the repeated names last, of which the first `kept` remain: all different
    # ones, or a random number of them.
    turn = jnp.where(repeated, jnp.inf, jax.random.uniform(order_key, (count,)))
    thinned, number = jax.random.uniform(number_key, (2,))
    few = 1 + jnp.floor(number * different).astype(jnp.int32)
    kept = jnp.where(thinned < dropout, few, different)
    named = jnp.argsort(jnp.argsort(turn)) < kept
    return Drawn(jax.random.permutation(color_key, count), named)


def color_map(
    label: Int[Array, "b h w"],
    query_class: Int[Array, "b q"] | Int[Array, "b q m"],
    drawn: Drawn,
    *,
    background: int,
) -> Int[Array, "b h w"]:
    """The color of the name that covers each pixel, `background` where none does, -1 where ignored.

    Of nested names the most specific one, which covers the fewest ids, has the pixel.
    """
    # Which names cover a pixel, [b, q, h, w].
    ids = query_class.reshape(*query_class.shape[:2], -1)
    covers = (label[:, None, None] == ids[..., None, None]).any(axis=2)
    covers &= drawn.named[..., None, None]

    # The most specific of them; rows of ids are filled up by repeating the last.
    width = 1 + (ids[..., 1:] != ids[..., :-1]).sum(axis=-1)
    cost = jnp.where(covers, width[..., None, None], ids.shape[-1] + 1)
    winner = cost.argmin(axis=1)

    rows = jnp.arange(len(label))[:, None, None]
    color = jnp.where(covers.any(axis=1), drawn.colors[rows, winner], background)
    return jnp.where(label < 0, -1, color)


def against_last(evidence: Float[Array, "n s *d"]) -> Float[Array, "n k *d"]:
    """Evidence of all colors but the last, less that of the last."""
    return evidence[:, :-1] - evidence[:, -1:]


def neutral_last(latents: Float[np.ndarray, "s c"]) -> Int[np.ndarray, " s"]:
    """The order of colors with the most neutral one last, for the background.

    Where the network is unsure between two colors, it paints a mean of them, which lies near that one.
    """
    distance = np.linalg.norm(latents - latents.mean(axis=0), axis=1).round(4)
    neutral = int(distance.argmin())
    return np.array([*[i for i in range(len(latents)) if i != neutral], neutral])
