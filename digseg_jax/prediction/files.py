# SPDX-License-Identifier: Apache-2.0
"""What a prediction reads and writes: images, queries and vocabularies; masks, overlays, JSON."""

from __future__ import annotations

import glob
import json
import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from digseg_jax.arraytypes import Float, Int, UInt8
from digseg_jax.data.datasets import registry
from digseg_jax.errors import UserError
from digseg_jax.prediction.answer import MostProbable
from digseg_jax.viz import images as pictures

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp")
SHOWN = 0.5  # an overlay colors a pixel by its most probable query, if that is more probable than this
ONE_COLOR = np.array([[230, 60, 30]], np.uint8)


def find_images(text: str) -> list[Path]:
    """A file, the pictures of a folder, or those that a glob matches; sorted.

    Raises:
      UserError: nothing there.
    """
    path = Path(text).expanduser()
    if path.is_dir():
        found = [p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file()]
        if not found:
            raise UserError(f"--image={text}: no pictures in this folder ({' '.join(SUFFIXES)})")
        return sorted(found)
    if not path.is_file() and glob.has_magic(text):
        found = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
        if not found:
            raise UserError(f"--image={text}: matches no file")
        return sorted(found)
    if not path.is_file():
        raise UserError(f"--image={text}: no such file")
    return [path]


def read_image(path: Path, name: str = "--image") -> UInt8[np.ndarray, "h w 3"]:
    """RGB of any file Pillow reads; transparency is laid over white, EXIF applied.

    name: what an error calls it.

    Raises:
      UserError: missing or unreadable file.
    """
    if not path.is_file():
        raise UserError(f"{name}={path}: no such file")
    try:
        with Image.open(path) as opened:
            return rgb(opened)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError, ValueError) as error:
        raise UserError(f"{name}={path}: not a readable image ({error})") from error


def rgb(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """An image of any of Pillow's modes as RGB; see `read_image`."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, np.float64)
        span = max(values.max() - values.min(), 1e-9)
        image = Image.fromarray(((values - values.min()) * 255 / span).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    return np.asarray(image.convert("RGB"))


def pixels_of(image: str | os.PathLike | Image.Image | np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    """RGB of a file, of a Pillow image, or of an array, which must be that already.

    Raises:
      UserError: missing or unreadable file, or an array of another type or shape.
    """
    if isinstance(image, Image.Image):
        return rgb(image)
    if isinstance(image, (str, os.PathLike)):
        return read_image(Path(image).expanduser(), "image")
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3 or not pixels.size:
        raise UserError(
            f"image: an array {pixels.dtype}{list(pixels.shape)}; legal are uint8 [height, width, 3], "
            "a Pillow image and the path of a file"
        )
    return pixels


def find_queries(queries: Sequence[str], vocabulary: str | None) -> list[str]:
    """The texts of --query, then those of --vocabulary: a file of lines, or a data set's classes.

    Raises:
      UserError: none at all, an empty one, the same twice, or no such vocabulary.
    """
    texts = list(queries)
    if vocabulary:
        path = Path(vocabulary).expanduser()
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            texts += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        elif vocabulary in registry.names():
            facts = registry.spec(vocabulary)
            texts += [facts.prompt(name) for name in facts.names]
        else:
            raise UserError(
                f"--vocabulary={vocabulary}: neither a file of one name a line nor a data set; "
                f"legal: {', '.join(registry.names())}"
            )
    if not texts:
        raise UserError("--mode=predict needs --query or --vocabulary")
    check_queries(texts)
    return texts


def check_queries(queries: Sequence[str], name: str = "--query") -> None:
    """Raises UserError: an empty query, the same one twice, or two whose files would share a name.

    name: what the error calls them.
    """
    files: dict[str, str] = {}
    for query in queries:
        if not query.strip():
            raise UserError(f"{name}: empty; name what to segment, such as 'snow and ice'")
        other = files.setdefault(slug(query), query)
        if queries.count(query) > 1:
            raise UserError(f"{name}={query!r}: asked twice")
        if other != query:
            raise UserError(f"{name}={query!r}: its files would overwrite those of {other!r}")


def targets(images: Sequence[Path], out: Path) -> list[Path]:
    """The mask file of each image: OUT itself if it ends in .png, else OUT/NAME.png.

    Raises:
      UserError: OUT cannot be written, or several images would share a file.
    """
    if out.suffix:
        if not out.parent.is_dir():
            raise UserError(f"--out={out}: no such directory {out.parent}")
        if out.is_dir() or out.suffix.lower() != ".png":
            raise UserError(f"--out={out}: must be a folder or the name of a file that ends in .png")
        if len(images) > 1:
            raise UserError(f"--out={out}: one file for {len(images)} images; name a folder")
        return [out]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be made ({error.strerror})") from error
    stems = [path.stem for path in images]
    names = [
        path.name.replace(".", "_") if stems.count(path.stem) > 1 else path.stem for path in images
    ]
    same = next((n for n in names if names.count(n) > 1), None)
    if same is not None:
        raise UserError(f"--image: several files are called {same!r}; predict one folder at a time")
    return [out / f"{name}.png" for name in names]


def write_prediction(
    path: Path,
    image: UInt8[np.ndarray, "h w 3"],
    queries: Sequence[str],
    masks: Iterable[Float[np.ndarray, "h w"]],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Writes everything of one image beside `path` (NAME.png) and returns what NAME.json says.

    NAME.png, or NAME_QUERY.png for several queries: 0 or 255. .probability.png: the soft mask.
    NAME.overlay.png: every query in its color over the photo, with a legend below. NAME.npz:
    "probability" float16 [q, h, w] and "queries".

    masks: the probabilities of each query, in their order; taken one at a time, so that a large image
    and many queries need no more memory than one mask.

    Raises:
      UserError: a file cannot be written.
    """
    height, width = image.shape[:2]
    winner, rows = MostProbable(SHOWN), []
    try:
        with zipfile.ZipFile(path.with_suffix(".npz"), "w", zipfile.ZIP_DEFLATED) as archive:
            with archive.open("probability.npy", "w", force_zip64=True) as stored:
                shape = (len(queries), height, width)
                header = {"descr": "<f2", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stored, header)
                for query, mask in zip(queries, masks, strict=True):
                    soft = mask.astype("<f2")  # masks and stored values must agree
                    stored.write(soft.tobytes())
                    rows.append(_write_mask(path, query, soft, alone=len(queries) == 1))
                    winner.see(soft)
            with archive.open("queries.npy", "w") as stored:
                np.lib.format.write_array(stored, np.asarray(queries))

        pictures.save_photo(path.with_suffix(".overlay.png"), overlay(image, queries, winner.label))
        summary = {**facts, "height": height, "width": width, "queries": rows}
        text = json.dumps(summary, indent=2, ensure_ascii=False)
        path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--out={path}: cannot be written ({error})") from error
    return summary


def _write_mask(path: Path, query: str, soft: np.ndarray, *, alone: bool) -> dict[str, Any]:
    """The two PNGs of a query; returns its row of the summary."""
    name = path if alone else path.with_stem(f"{path.stem}_{slug(query)}")
    mask = soft > 0.5
    Image.fromarray(mask.astype(np.uint8) * 255).save(name)
    pictures.save_mask(name.with_suffix(".probability.png"), soft)
    row = {"query": query, "mask": name.name, "coverage": float(mask.mean())}
    return row | {"highest": float(soft.max())}


def overlay(
    image: UInt8[np.ndarray, "h w 3"], queries: Sequence[str], label: Int[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h2 w 3"]:
    """The image in the colors of a label map of queries (-1: none of them), with a legend below."""
    colors = ONE_COLOR if len(queries) == 1 else pictures.class_colors(len(queries), queries)
    painted = pictures.overlay(image, label, colors, alpha=0.5)
    shown = [q for q in range(len(queries)) if (label == q).any()] or list(range(len(queries)))
    strip = pictures.legend([queries[q] for q in shown], colors[shown], width=image.shape[1])
    return np.concatenate([painted, strip])


def slug(query: str) -> str:
    """A query as part of a file name."""
    return "".join(c if c.isalnum() else "_" for c in query.strip().lower())
