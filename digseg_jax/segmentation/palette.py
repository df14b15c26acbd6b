# SPDX-License-Identifier: Apache-2.0
"""The `palette` codec: one mask image shows all classes of a closed set, each in its own color.

The colors are chosen for the autoencoder, by how far apart they are after a round trip and as latents.
A data set's official colors are not used: several sets have duplicates. To read a pixel, its squared
distances to all colors, over 2 sigma^2, are negated and go through a softmax; sigma is the error of the
autoencoder's round trip.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from digseg_jax.arraytypes import Array, Bool, Float, Int
from digseg_jax.config.codecs import QUERY_FORMS
from digseg_jax.config.schema import DataConfig
from digseg_jax.data.vocabulary import num_classes
from digseg_jax.errors import UserError
from digseg_jax.segmentation.codec import Codec, HostAutoencoder, ImageMap, require_prepared
from digseg_jax.segmentation.mask_loss import balanced_ce_and_dice, class_shares, palette_logits
from digseg_jax.segmentation.synthetic import synthetic_maps

PROMPT = "segmentation map of all classes"  # the one text that all images of a palette get
PATCH_CELLS = 8  # latent cells; side of the flat images whose latents stand for the palette's colors

# Choice of the colors.
LEVELS = 6  # values per channel, 0.4 (51 of 255) apart, of the candidates
SATURATIONS = (1.0, 0.6, 0.35, 0.2)  # each candidate also comes less saturated
MAX_CLASSES = LEVELS**3
REACH = 4.0  # largest norm of a color's latent; images have about 2 (unit variance, 4 channels)
PATCH = 32  # pixels; side of the flat image that tries out a candidate
BATCH = 54  # flat images per call of the autoencoder
FLOOR = 0.02  # added to every color's scatter, so that distance decides among colors without any
EXCHANGE_SWEEPS = 10  # most passes over the chosen colors
SYNTHETIC_MAPS = 16  # label maps that sigma is measured on


@dataclasses.dataclass(frozen=True)
class Palette:
    """The colors of a closed set's classes, in [-1, 1].

    colors: [c, 3]; what is painted.
    prototypes: [c, 3]; mean colors after the autoencoder's round trip, which pixels are compared with.
    sigma: root mean square, per channel, of a pixel's difference from its prototype.
    """

    colors: np.ndarray
    prototypes: np.ndarray
    sigma: float

    @property
    def scale(self) -> float:
        """Factor from the evidence of `decode_palette` to logits."""
        return 1.0 / self.sigma**2

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON; `from_dict` reads them."""
        rows = {"colors": self.colors.tolist(), "prototypes": self.prototypes.tolist()}
        return {**rows, "sigma": self.sigma}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Palette:
        """Reads what `to_dict` returned.

        Raises:
          UserError: something is missing, or is not what it was.
        """
        colors, prototypes = (stored_rows(values, key, 3) for key in ("colors", "prototypes"))
        sigma: Any = values.get("sigma")
        if len(colors) != len(prototypes):
            raise UserError(f"damaged: {len(colors)} colors, but {len(prototypes)} prototypes")
        if type(sigma) not in (int, float) or not 0 < sigma < np.inf:
            raise UserError(f"damaged: sigma={str(sigma):.40}, expected a number above 0")
        return cls(colors, prototypes, float(sigma))


def stored_rows(values: Mapping[str, Any], key: str, width: int = 0) -> Float[np.ndarray, "n w"]:
    """A table of numbers from a codec's stored state; `width` of them in a row, 0: any number.

    Raises:
      UserError: it is missing, or no such table.
    """
    try:
        with np.errstate(over="ignore"):
            table = np.asarray(values[key], np.float32)
    except KeyError as error:
        raise UserError(f"damaged: no {key}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"damaged: {key} has something else than rows of numbers") from error
    if table.ndim != 2 or not table.size or table.shape[1] != (width or table.shape[1]):
        legal = f"rows of {width} numbers" if width else "rows of numbers"
        raise UserError(f"damaged: {key} has the shape {list(table.shape)}, expected {legal}")
    if not np.isfinite(table).all():
        raise UserError(f"damaged: {key} has values that are no numbers (nan or infinite)")
    return table


class ColorCodec(Codec):
    """Base of the codecs that paint all answers into a single mask image, in colors of a palette."""

    exclusive: ClassVar[bool] = True

    def __init__(self) -> None:
        self._palette: Palette | None = None
        self._latents: np.ndarray | None = None

    @property
    def palette(self) -> Palette:
        """The colors, chosen with this autoencoder or restored."""
        return require_prepared(self._palette, f"{type(self).__name__}.palette")

    @property
    def color_latents(self) -> Float[np.ndarray, "s c"]:
        """Mean latents of flat images, one for each of the palette's colors."""
        return require_prepared(self._latents, f"{type(self).__name__}.color_latents")

    @property
    def scale(self) -> float:
        return self.palette.scale

    def num_images(self, queries: int) -> int:
        return 1

    def color_logits(self, latent: Float[Array, "*b h w c"]) -> Float[Array, "*b h w s"]:
        """Logit of each color by a latent cell's distance to the color's own latent."""
        return palette_logits(latent, jnp.asarray(self.color_latents))

    def assume_colors(self, count: int, latent_channels: int) -> None:
        """Sets made-up colors of the right shapes; their latents differ, as real ones do."""
        table = np.zeros((count, 3), np.float32)
        self._palette = Palette(table, table, 1.0)
        values = np.arange(count * latent_channels, dtype=np.float32)
        self._latents = values.reshape(count, latent_channels)


class PaletteCodec(ColorCodec):
    """Paints and reads all classes of one data set in a single mask image.

    classes: of the data set.
    """

    name: ClassVar[str] = "palette"
    closed: ClassVar[bool] = QUERY_FORMS[name].closed

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes

    @classmethod
    def for_data(cls, data: DataConfig, classes: int | None = None) -> Self:
        if data.mixture:
            raise UserError(
                "config.data.mixture: a palette has the colors of one class list; with "
                "config.model.codec='palette' train on one data set"
            )
        return cls(num_classes(data) if classes is None else classes)

    def texts(self, queries: Sequence[str]) -> tuple[str, ...]:
        """The constant prompt: all classes are asked for at once."""
        return (PROMPT,)

    def text_rows(self, query: Int[Array, "b q"]) -> Int[Array, "b 1"]:
        return jnp.zeros((len(query), 1), jnp.int32)

    def slots(self, count: int) -> int:
        return count

    def check_queries(self, queries: Sequence[str]) -> None:
        if len(queries) != self.classes:
            raise UserError(
                f"{len(queries)} queries: this palette answers its {self.classes} classes at once; for "
                "free text use weights of the binary codec"
            )

    def encode(
        self,
        label: Int[Array, "b h w"],
        query_class: Int[Array, "b q"] | Int[Array, "b q m"],
        drawn: Any = None,
    ) -> Float[Array, "b 1 h w 3"]:
        return encode_palette(label, jnp.asarray(self.palette.colors))[:, None]

    def decode(self, image: Float[Array, "n h w 3"]) -> Float[Array, "n s h w"]:
        return decode_palette(image, jnp.asarray(self.palette.prototypes))

    def read_latents(self, latents: Float[Array, "n 1 e h w c"]) -> Float[Array, "n s e h w"]:
        """Reads each cell by its distances to the colors' latents, in the units of `decode`.

        The auxiliary loss trains just these distances.
        """
        return jnp.moveaxis(self.color_logits(latents[:, 0]), -1, 1) / self.scale

    def mask_loss(
        self,
        latent: Float[Array, "n h w c"],
        label: Int[Array, "b H W"],
        query_class: Int[Array, "b q"] | Int[Array, "b q m"],
        valid: Bool[Array, "n h w"],
        anchors: Float[Array, "a h w c"] | None,
        drawn: Any = None,
    ) -> Float[Array, " n"]:
        """Balanced cross-entropy plus Dice over the distances to the colors' latents."""
        shares = class_shares(label, label.shape[1] // latent.shape[1], self.classes)
        return balanced_ce_and_dice(self.color_logits(latent), shares, valid)

    def prepare(self, autoencoder: HostAutoencoder) -> None:
        # A palette that was restored with trained weights stays as it is.
        if self._palette is None:
            self._palette = build_palette(self.classes, autoencoder.round_trip, autoencoder.encode)
        if self._latents is None:
            self._latents = flat_latents(self._palette.colors, autoencoder)

    def assume(self, latent_channels: int) -> None:
        self.assume_colors(self.classes, latent_channels)

    def state(self) -> dict[str, Any]:
        return self.palette.to_dict()

    def restore(self, state: dict[str, Any]) -> None:
        if not state:
            raise UserError("missing; these weights were not trained with a palette")
        stored = Palette.from_dict(state)
        if len(stored.colors) != self.classes:
            raise UserError(f"{len(stored.colors)} colors for {self.classes} classes")
        self._palette, self._latents = stored, None


def encode_palette(label: Int[Array, "b h w"], colors: Float[Array, "c 3"]) -> Float[Array, "b h w 3"]:
    """The color of every pixel's class; ignored pixels (-1) are mid gray."""
    table = jnp.concatenate([jnp.asarray(colors), jnp.zeros((1, 3))])
    return table[jnp.where(label < 0, len(colors), label)]


def decode_palette(
    image: Float[Array, "*b h w 3"], prototypes: Float[Array, "c 3"]
) -> Float[Array, "*b c h w"]:
    """Evidence of every class: minus half the squared distance to its color, at most 0."""
    # Expanded square: differences between every pixel and every color would need 3 c values a pixel.
    # Its terms nearly cancel, so the products must be exact: TPUs and GPUs would round the factors.
    exact = jax.lax.Precision.HIGHEST
    cross = jnp.einsum("...hwk,ck->...chw", image, prototypes, precision=exact)
    squares = jnp.square(image).sum(axis=-1)[..., None, :, :]
    own = jnp.square(prototypes).sum(axis=-1)[:, None, None]
    return jnp.minimum(cross - 0.5 * (squares + own), 0.0)


def flat_latents(
    colors: Float[np.ndarray, "s 3"], autoencoder: HostAutoencoder
) -> Float[np.ndarray, "s c"]:
    """Mean latent of a flat image of each color."""
    size = PATCH_CELLS * autoencoder.factor
    flat = np.broadcast_to(colors[:, None, None], (len(colors), size, size, 3))
    return autoencoder.encode(flat.astype(np.float32)).mean(axis=(1, 2))


def build_palette(num_classes: int, round_trip: ImageMap, encode: ImageMap) -> Palette:
    """Chooses the colors of a closed set for one autoencoder; deterministic.

    Two colors must differ in three ways. Decoded, so that pixels can be read. As latents, because the
    U-Net's error there is about equal along each axis: it loses colors that the autoencoder codes by a
    small shift of one channel, however different they look. And their latents must not be larger than
    those of images, which the noise schedule assumes: an autoencoder that saw few bright colors codes
    them ten times as large, and the U-Net would spend long on learning that scale.

    Args:
      num_classes: colors to choose.
      round_trip: encodes and decodes images [n, h, w, 3].
      encode: images to latents.

    Raises:
      UserError: more classes than there are candidate colors.
    """
    if not 1 <= num_classes <= MAX_CLASSES:
        raise UserError(
            f"config.model.codec='palette': {num_classes} classes; legal 1 to {MAX_CLASSES}, "
            "use 'binary' for more"
        )

    # Every candidate as a flat image: what becomes of it, decoded and as a latent.
    colors = candidates()
    flat = np.broadcast_to(colors[:, None, None], (len(colors), PATCH, PATCH, 3))
    decoded, latents = (
        np.concatenate([f(flat[i : i + BATCH]) for i in range(0, len(flat), BATCH)])
        for f in (round_trip, encode)
    )

    # Only those whose latents have the size of an image's.
    near = _within_reach(latents.mean(axis=(1, 2)))
    colors, decoded, latents = colors[near], decoded[near], latents[near]

    # Of these the set whose closest pair is farthest apart.
    means = decoded.mean(axis=(1, 2))
    scatter = np.sqrt(np.square(decoded - means[:, None, None]).mean(axis=(1, 2, 3)))
    chosen = choose(means, scatter, latents.mean(axis=(1, 2)), num_classes)

    # Rounded: another machine's last digits must not give another palette.
    drawn = Palette(colors[chosen], means[chosen].round(4).astype(np.float32), 1.0)
    return dataclasses.replace(drawn, sigma=round(fit_sigma(drawn, round_trip), 5))


def candidates() -> Float[np.ndarray, "n 3"]:
    """All colors of LEVELS evenly spaced values per channel, in [-1, 1], at every saturation."""
    levels = np.linspace(-1, 1, LEVELS)
    cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    gray = cube.mean(axis=-1, keepdims=True)
    drawn = np.concatenate([gray + s * (cube - gray) for s in SATURATIONS])
    return np.unique(drawn.round(3), axis=0).astype(np.float32)


def _within_reach(latents: Float[np.ndarray, "n c"]) -> Int[np.ndarray, " m"]:
    """Indices of latents of norm at most REACH, or of the MAX_CLASSES smallest if those are more."""
    norm = np.linalg.norm(latents, axis=-1).round(4)
    return np.flatnonzero(norm <= max(REACH, np.sort(norm)[MAX_CLASSES - 1]))


def choose(
    means: Float[np.ndarray, "n 3"],
    scatter: Float[np.ndarray, "n"],
    latents: Float[np.ndarray, "n c"],
    count: int,
) -> list[int]:
    """Chooses `count` candidates, each as far as possible from its nearest neighbor.

    The distance of two candidates is the smaller one of two: between their decoded means, relative to
    their scatter, and between their latents. Each is first divided by its median over all pairs.

    Args:
      means: mean colors after the round trip.
      scatter: root mean square of the pixels around them.
      latents: mean latents.
      count: candidates to choose.

    Returns:
      Indices of the chosen ones.
    """
    seen = _distances(means) / (scatter[:, None] + scatter[None] + FLOOR)
    coded = _distances(latents)
    distance = np.minimum(seen / np.median(seen), coded / np.median(coded)).round(4)

    # Greedy: start with the most extreme color, then always add the one farthest from those chosen.
    chosen = [int(np.argmax(np.linalg.norm(means - means.mean(axis=0), axis=1).round(4)))]
    while len(chosen) < count:
        chosen.append(_farthest(distance, chosen))

    # Then exchange single colors, as long as that takes one farther from the others.
    for _ in range(EXCHANGE_SWEEPS):
        before = list(chosen)
        for place in range(count if count > 1 else 0):
            others = chosen[:place] + chosen[place + 1 :]
            best = _farthest(distance, others)
            if distance[best, others].min() > distance[chosen[place], others].min():
                chosen[place] = best
        if chosen == before:
            break

    return chosen


def _distances(points: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n n"]:
    """Euclidean distances of all pairs of points."""
    return np.linalg.norm(points[:, None] - points[None], axis=-1)


def _farthest(distance: np.ndarray, taken: list[int]) -> int:
    """Index of the candidate that is farthest from its nearest taken one."""
    nearest = distance[:, taken].min(axis=1)
    nearest[taken] = -1.0
    return int(np.argmax(nearest))


def fit_sigma(palette: Palette, round_trip: ImageMap) -> float:
    """Root mean square, per channel, of round-tripped pixels' differences from their prototypes."""
    labels = synthetic_maps(SYNTHETIC_MAPS, len(palette.colors))
    residual = round_trip(palette.colors[labels]) - palette.prototypes[labels]
    return max(float(np.sqrt(np.square(residual).mean())), 1e-3)
