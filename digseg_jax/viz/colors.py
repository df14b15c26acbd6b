# SPDX-License-Identifier: Apache-2.0
"""Class colors: official ones of data sets, natural ones for land cover, well-separated ones else.

Separation is measured in CIELAB, as seen with normal vision and with the two common color
deficiencies (matrices: Machado, Oliveira, Fernandes 2009, severity 1); the smallest of the three
distances counts, so classes differ in lightness, not only in hue.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from digseg_jax.arraytypes import Float, UInt8
from digseg_jax.errors import UserError

IGNORE_COLOR = (128, 128, 128)

# chosen by a search near the natural hues for at least 19 CIELAB units between any two of them
_WATER, _FOREST, _FARM, _CITY = "#316db8", "#18522f", "#ecc53c", "#d24628"
_ICE, _BARE = "#f1f6fb", "#bd9268"
NATURAL = {
    "water": _WATER,
    "forest": _FOREST,
    "shrub and grass": "#afc55e",
    "cropland": _FARM,
    "wetland": "#30bdbd",
    "urban": _CITY,
    "snow and ice": _ICE,
    "barren": _BARE,
    # other words for the same groups, as open-vocabulary queries use them
    "ocean": _WATER,
    "woodland": _FOREST,
    "farmland": _FARM,
    "city": _CITY,
    "ice sheet": _ICE,
    "desert": _BARE,
    "background": "#cfd4d9",  # what is not asked for: pale, and no hue
}

# Okabe and Ito's set without black, and without the two that resemble the gray of ignored pixels
_FIRST = ("#e69f00", "#56b4e9", "#f0e442", "#0072b2", "#d55e00")

_DEFICIENCIES = np.array(
    [
        np.eye(3),
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
         [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
         [-0.011820, 0.042940, 0.968881]],
    ]
)  # fmt: skip
_TO_XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
)  # fmt: skip


def to_hex(color: Sequence[int] | np.ndarray) -> str:
    """Returns `#rrggbb` for three values in 0..255."""
    return "#{:02x}{:02x}{:02x}".format(*(int(c) for c in color))


def from_hex(text: str) -> tuple[int, int, int]:
    """Returns three values in 0..255 for `#rrggbb`; raises UserError for other text."""
    try:
        if len(text) != 7 or text[0] != "#":
            raise ValueError
        return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)
    except (ValueError, TypeError):
        raise UserError(f"color {text!r} must look like '#rrggbb'") from None


def seen_lab(colors: UInt8[np.ndarray, "n 3"]) -> Float[np.ndarray, "views n 3"]:
    """Converts to CIELAB coordinates as seen with normal, protanopic and deuteranopic vision."""
    # sRGB to linear light, in which the deficiencies are matrices.
    value = np.asarray(colors, np.float64) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    views = np.clip(np.einsum("vij,nj->vni", _DEFICIENCIES, linear), 0, 1)

    # Linear light to CIELAB, relative to the display's white.
    xyz = views @ _TO_XYZ.T / _TO_XYZ.sum(axis=1)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def separation(
    a: UInt8[np.ndarray, "n 3"], b: UInt8[np.ndarray, "m 3"], normal_weight: float = 1.0
) -> Float[np.ndarray, "n m"]:
    """Distance in CIELAB between two sets of colors: the smallest of the three views.

    A `normal_weight` below 1 asks for more distance in normal vision than in the other two.
    """
    views = np.linalg.norm(seen_lab(a)[:, :, None] - seen_lab(b)[:, None], axis=-1)
    views[0] *= normal_weight
    return views.min(axis=0)


@functools.cache
def _candidates() -> UInt8[np.ndarray, "n 3"]:
    """Colors to choose from: a grid in RGB without the extremes."""
    levels = np.linspace(10, 250, 15).astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    lightness, a, b = np.moveaxis(seen_lab(grid)[0], -1, 0)

    # neither near black or white, nor so pale that it passes for the gray of ignored pixels
    chroma = np.hypot(a, b)
    return grid[(lightness > 25) & (lightness < 92) & (chroma > 22) & (chroma < 90)]


@functools.cache
def _extended(fixed: tuple[str, ...], n: int) -> tuple[str, ...]:
    """Adds colors to `fixed` up to n, each the farthest from all those before it."""
    # `distance`: of every candidate to the nearest color taken so far.
    chosen = list(fixed)
    pool = _candidates()
    taken = np.array([IGNORE_COLOR, *map(from_hex, chosen)], np.uint8)
    weight = 0.6  # at equal weights the search gives up on hue, above all on green
    distance = separation(pool, taken, weight).min(axis=1)

    while len(chosen) < n:
        best = int(np.argmax(distance))
        chosen.append(to_hex(pool[best]))
        distance = np.minimum(distance, separation(pool, pool[best : best + 1], weight)[:, 0])

    return tuple(chosen[:n])


_MOST = 2000  # different colors of classes


def class_colors(
    n: int,
    names: Sequence[str] | None = None,
    official: Sequence[tuple[int, int, int] | None] = (),
) -> UInt8[np.ndarray, "n 3"]:
    """Chooses colors for n classes, none of them the gray of ignored pixels; 2000 are all different.

    A class gets its official color if it has one. Of the others, with names, the land-cover groups get
    their natural colors (water is blue), and the rest colors far from those. Of two classes with the
    same color the first gets it. The same arguments always give the same colors.

    official: RGB of each class, None for a class without; empty: none has one.

    Raises:
      UserError: n is negative, or not the number of names or official colors.
    """
    if n < 0 or (names is not None and len(names) != n) or len(official) not in (0, n):
        found = "" if names is None else f" with {len(names)} names"
        found += f" and {len(official)} official colors" if official else ""
        raise UserError(f"class_colors({n}){found}: n must be at least 0 and equal their number")

    # Further classes have the colors of the first ones again: nobody tells so many apart.
    if n > _MOST:
        first = class_colors(_MOST, None if names is None else names[:_MOST], official[:_MOST])
        return first[np.arange(n) % _MOST]

    # The classes whose colors are given, by index.
    table: dict[int, str] = {}
    for index in range(n):
        color = NATURAL.get(names[index].strip().lower()) if names is not None else None
        if official and (rgb := official[index]) is not None:
            color = to_hex(rgb)
        if color not in (None, to_hex(IGNORE_COLOR), *table.values()):
            table[index] = str(color)

    # All other classes, in their order, share the further colors.
    given = tuple(table.values())
    spare = iter(_extended(given or _FIRST, max(n, len(given or _FIRST)))[len(given) :])
    rows = [from_hex(table[i] if i in table else next(spare)) for i in range(n)]
    return np.array(rows, np.uint8).reshape(n, 3)
