# SPDX-License-Identifier: Apache-2.0
"""python -m tests.bench.readme_image [--out=configs/readme.png]: the image at the head of the README.

The shipped segmenter is asked for words on two held-out tiles. A row shows the tile, the probability of
every word (black 0, white 1), the most probable word of each pixel, and the labels of MODIS.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags
from PIL import Image, ImageDraw, ImageFont

from digseg_jax.arraytypes import Float, UInt8
from digseg_jax.data.datasets import landcover
from digseg_jax.log import setup
from digseg_jax.prediction.pretrained import load_segmenter
from digseg_jax.prediction.segmenter import Segmenter
from digseg_jax.runtime import cpu
from digseg_jax.viz.images import class_colors, paint

SIDE = 170  # pixels of a tile in the image
GAP = 6
CAPTION = 24  # pixels above a tile
SEED = 0


class Row(NamedTuple):
    """A tile of the test split and the words that it is asked for."""

    tile: landcover.Tile
    words: tuple[str, ...]


# "woodland", "farmland", "ocean" and "desert" are words that training never used
ROWS = (
    Row(landcover.Tile(8, 33), ("water", "woodland", "farmland", "shrub and grass")),
    Row(landcover.Tile(6, 20), ("ocean", "desert", "cropland", "shrub and grass")),
)


def draw_row(row: Row, segmenter: Segmenter) -> UInt8[np.ndarray, "h w 3"]:
    """One row of the image: tile, probabilities, answer, labels, each with its caption."""
    scene = landcover.load().window(row.tile.top, row.tile.left, landcover.TILE)
    (probability,) = segmenter.predict_masks([scene["image"]], row.words, ensemble=8, steps=2, key=SEED)

    # Words and labels have the same color where they mean the same.
    answer = paint(probability.argmax(axis=0), class_colors(len(row.words), row.words))
    labels = paint(scene["groups"], class_colors(len(landcover.GROUPS), landcover.GROUPS))

    cells = [draw_cell("image", scene["image"])]
    for word, mask in zip(row.words, probability, strict=True):
        cells.append(draw_cell(f"“{word}”", gray(mask)))
    cells += [draw_cell("most probable word", answer), draw_cell("MODIS labels", labels)]
    return np.concatenate(cells, axis=1)


def gray(mask: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """A probability in 0..1 as shades of gray."""
    shade = np.rint(np.clip(mask, 0, 1) * 255).astype(np.uint8)
    return np.repeat(shade[..., None], 3, axis=-1)


def draw_cell(caption: str, pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h2 w2 3"]:
    """Pixels enlarged to `SIDE`, with a caption above them and white space around them."""
    cell = Image.new("RGB", (SIDE + GAP, CAPTION + SIDE + GAP), "white")
    cell.paste(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC), (0, CAPTION))
    place = (SIDE / 2, CAPTION - 5)
    ImageDraw.Draw(cell).text(place, caption, "black", ImageFont.load_default(size=15), anchor="ms")
    return np.asarray(cell)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.readme_image", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("configs/readme.png"))
    arguments = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # the models read absl's flags outside absl.app
    setup()
    cpu.tune()

    segmenter = load_segmenter("assets:segmenter")
    image = Image.fromarray(np.concatenate([draw_row(row, segmenter) for row in ROWS]))

    # 256 colors keep the file small.
    image.quantize(256, dither=Image.Dither.NONE).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
