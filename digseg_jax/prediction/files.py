# SPDX-License-Identifier: Apache-2.0
"""Input and output of a prediction: images, queries and vocabularies; masks, overlays and JSON."""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from digseg_jax.arraytypes import Float, Int, UInt8
from digseg_jax.config.templates import PLACE
from digseg_jax.data.datasets import registry
from digseg_jax.data.datasets.class_list import read_class_list
from digseg_jax.data.datasets.pairs import is_junk
from digseg_jax.data.datasets.readers import rle
from digseg_jax.data.datasets.spec import Color
from digseg_jax.errors import UserError
from digseg_jax.io.files import UnreadableError, expanded, shown
from digseg_jax.io.georeference import write_raster
from digseg_jax.io.image_file import IMAGE_ENDINGS, read_image, upright_rgb
from digseg_jax.io.names import UNSEEN, key
from digseg_jax.prediction.answer import MostProbable
from digseg_jax.prediction.targets import PredictionFiles, check_not_replaced, names_of_predictions
from digseg_jax.viz import images as viz

SHOWN = 0.5  # an overlay colors a pixel by its most probable query if the probability exceeds this
ONE_COLOR = np.array([[230, 60, 30]], np.uint8)  # RGB of a single query


def find_images(places: str | Sequence[str]) -> list[Path]:
    """Finds the images that files, folders and globs name; sorted within each, none twice.

    Raises:
      UserError: a place without images.
    """
    # A dictionary drops repeated paths and keeps the order of the places.
    texts = [places] if isinstance(places, str) else places
    return list(dict.fromkeys(path for text in texts for path in _images_of(text)))


def _images_of(text: str) -> list[Path]:
    """The images of one place: a file, a folder or a glob; sorted.

    Raises:
      UserError: no image there.
    """
    # A folder: its images by their endings, without the hidden files that systems leave behind, and
    # without the files of predictions: an interrupted one may have written into the same folder.
    path = expanded(text)
    if text and path.is_dir():
        entries = list(os.scandir(path))
        written = names_of_predictions(path, {entry.name for entry in entries})
        found = [
            Path(entry.path)
            for entry in entries
            if entry.name.lower().endswith(IMAGE_ENDINGS)
            and entry.name not in written
            and not (is_junk(entry.name) or entry.is_dir())
        ]
        if not found:
            endings = " ".join(IMAGE_ENDINGS)
            raise UserError(f"--image={shown(text)}: no images in this folder ({endings})")
        return sorted(found)

    # A glob, unless a file or folder really has such a name. It may name files of any ending.
    if not path.exists() and glob.has_magic(text):
        whole = path.parent.is_dir() and os.path.join(glob.escape(str(path.parent)), path.name)
        matched = [Path(p) for p in glob.glob(whole or str(path), recursive=True)]
        matched = [p for p in matched if not p.is_dir() and not is_junk(p.name)]
        if not matched:
            raise UserError(f"--image={shown(text)}: matches no file")
        return sorted(matched)

    # A single file, whatever its ending.
    if not path.exists() or not text:
        if "://" in text or text.startswith("data:"):
            raise UserError(
                f"--image={shown(text)[:200]}: a web address; download the image and name the file"
            )
        raise UserError(f"--image={shown(text)}: no such file")
    return [path]


def read_rgb(path: Path, name: str = "--image") -> UInt8[np.ndarray, "h w 3"]:
    """Reads an image file as RGB, rotated by its EXIF orientation (see `digseg_jax.io.image_file`).

    name: the flag or argument that an error names.

    Raises:
      UnreadableError: missing or unreadable file.
    """
    try:
        return read_image(path).upright()
    except UnreadableError as error:
        raise UnreadableError(f"{name}={error}") from error


def pixels_of(image: str | os.PathLike | Image.Image | np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels of a file, a Pillow image, or an array that is uint8 [h, w, 3] already.

    Raises:
      UserError: missing or unreadable file, or an array of another type or shape.
    """
    # Pillow reads the pixels only now, so a broken file may show up here.
    if isinstance(image, Image.Image):
        try:
            return upright_rgb(image)
        except (ValueError, OSError) as error:
            raise UserError(f"image: {image}: {error}") from error
    if isinstance(image, (str, os.PathLike)):
        return read_rgb(expanded(image), "image")

    # An array of another type is not converted: its value range would be a guess.
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3 or not pixels.size:
        raise UserError(
            f"image: an array {pixels.dtype}{list(pixels.shape)}; legal are uint8 [height, width, 3], "
            "a Pillow image and the path of a file"
        )
    return pixels


def find_queries(queries: Sequence[str], vocabulary: str | None) -> list[str]:
    """Queries of --query, then the classes of --vocabulary: a class list's or a data set's.

    If the list gives synonyms of a class, its first name is asked.

    Raises:
      UserError: no query at all, an empty or repeated one, or no such vocabulary.
    """
    # A file comes before a data set of the same name.
    texts = list(queries)
    if vocabulary:
        path = expanded(vocabulary)
        if path.is_file():
            texts += [info.name for info in read_class_list(path).classes]
        elif vocabulary in registry.names():
            texts += registry.spec(vocabulary).names
        else:
            raise UserError(
                f"--vocabulary={vocabulary}: neither a file with one name per line nor a data set; "
                f"legal: {', '.join(registry.names())}"
            )

    # An empty class list is as good as none.
    if not texts:
        raise UserError("--mode=predict needs --query or --vocabulary")
    check_queries(texts)
    return texts


def vocabulary_template(vocabulary: str | None) -> str:
    """The template of the data set that --vocabulary names; the bare name for anything else."""
    # A file comes before a data set of the same name, as in `find_queries`.
    if not vocabulary or expanded(vocabulary).is_file():
        return PLACE
    return registry.spec(vocabulary).template if vocabulary in registry.names() else PLACE


def check_queries(queries: Sequence[str], name: str = "--query") -> None:
    """Checks that no query is blank, none has characters that cannot be seen, and none is asked twice.

    name: the flag or argument that an error names.

    Raises:
      UserError: such a query; neither spaces around and between words nor the two Unicode forms of an
        accent make another one.
    """
    seen = set[str]()
    for query in queries:
        words = unicodedata.normalize("NFC", " ".join(query.split()))
        if all(unicodedata.category(c)[0] in "PZM" for c in words):  # punctuation and lone marks
            raise UserError(f"{name}: empty; name what to segment, such as 'snow and ice'")
        if UNSEEN.search(query):
            raise UserError(f"{name}={query!r}: has a control or invisible character; type it again")
        if words in seen:
            raise UserError(f"{name}={query!r}: asked twice")
        seen.add(words)


def check_order(queries: Sequence[str], classes: Sequence[str]) -> None:
    """Checks that no class of a palette is asked for at another's place: its masks come in its order.

    Raises:
      UserError: a class is not at its place; other words stand for the class at theirs.
    """
    places = {key(name): place for place, name in enumerate(classes)}
    for place, query in enumerate(queries):
        if places.get(key(query.strip()), place) != place:
            raise UserError(
                f"--query={query!r}: this palette answers its classes in their order; ask for "
                f"{', '.join(classes)}"
            )


def write_prediction(
    files: PredictionFiles,
    image: UInt8[np.ndarray, "h w 3"],
    queries: Sequence[str],
    masks: Iterable[Float[np.ndarray, "h w"]],
    facts: dict[str, Any],
    colors: UInt8[np.ndarray, "q 3"] | None = None,
    advance: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes the files of one image's prediction; returns the content of NAME.json.

    NAME.png, or NAME_QUERY.png for several queries: the mask, 0 or 255. NAME.probability.png or
    NAME_QUERY.probability.png: the soft mask. NAME.overlay.png: every query in its color over the
    image, with a legend below. NAME.labels.png: of each pixel the index of the most probable query, in
    the same colors; the highest number where no query exceeds 0.5. NAME.coco.json: the masks as COCO
    annotations. NAME.npz: "probability" float16 [q, h, w] and "queries". Of a georeferenced image,
    NAME.labels.tif and NAME.probability.tif are the same at its place, the soft masks times 255.

    All files are made in a scratch folder and then moved: an existing file is replaced by a complete
    one or not at all. NAME.json says "complete" once all of them are there.

    masks: the probabilities of each query, in their order; taken one at a time, so that a large image
    and many queries need no more memory than one mask. colors: of the queries; `query_colors` if left
    out. advance: called after each query with the number written and the total.

    Raises:
      UserError: a file cannot be written, or would replace the image itself.
    """
    folder = files.base.parent
    colors = query_colors(queries) if colors is None else colors
    if "image" in facts:
        check_not_replaced(files, [Path(facts["image"])], shown(files.base))

    # The scratch folder is on the same disk, where moving a file is atomic.
    try:
        with tempfile.TemporaryDirectory(prefix=".predict_", dir=folder) as scratch:
            made = dataclasses.replace(files, base=Path(scratch) / files.base.name)
            summary = _write_all(made, image, queries, masks, facts, colors, advance)
            for source, target in zip(made, files, strict=True):
                source.replace(target)

            # Written first to mark whose files these are, the summary now says that all are there.
            summary["complete"] = True
            write_json(made.summary, summary)
            made.summary.replace(files.summary)
    except UserError:  # of the image or the masks, which are computed meanwhile
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"--out={shown(files.base)}: cannot be written ({error})") from error
    return summary


def _write_all(
    files: PredictionFiles,
    image: UInt8[np.ndarray, "h w 3"],
    queries: Sequence[str],
    masks: Iterable[Float[np.ndarray, "h w"]],
    facts: dict[str, Any],
    colors: UInt8[np.ndarray, "q 3"],
    advance: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Writes the files of `write_prediction`; returns the summary."""
    height, width = image.shape[:2]
    winner, rows, annotations = MostProbable(SHOWN), [], []

    # NAME.npz is written by hand, plane by plane: `np.savez` would need all planes in memory.
    with zipfile.ZipFile(files.archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("probability.npy", "w", force_zip64=True) as stored:
            shape = (len(queries), height, width)
            header = {"descr": "<f2", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stored, header)

            # One pass over the masks serves the archive, the PNGs and the overlay. All use the float16
            # values, so that a threshold on the stored ones gives the same mask.
            for place, (query, mask) in enumerate(zip(queries, masks, strict=True)):
                soft = mask.astype("<f2")
                stored.write(soft.tobytes())
                rows.append(_write_mask(files, place, query, soft))
                annotations += coco_annotation(place, soft)
                winner.see(soft)
                if advance is not None:
                    advance(place + 1, len(queries))
        with archive.open("queries.npy", "w") as stored:
            np.lib.format.write_array(stored, np.asarray(queries))

    # The images of all queries, in the same colors.
    viz.save_photo(files.overlay, overlay(image, queries, winner.label, colors))
    viz.save_index(files.labels, winner.label, colors)

    # The same at the image's place on the earth.
    if files.georeferenced:
        _write_rasters(files, Path(facts["image"]), queries, winner.label, colors)

    # The summary has the legend of the index map; names that are not Unicode are written readably.
    rows = [{**row, "index": k, "color": viz.to_hex(colors[k])} for k, row in enumerate(rows)]
    facts = {key: shown(value) if key == "image" else value for key, value in facts.items()}
    summary = {**facts, "height": height, "width": width, "queries": rows}
    write_json(files.summary, summary)

    # The image's name in the annotations is its file's, or that of the prediction.
    name = Path(facts["image"]).name if "image" in facts else files.base.name
    write_json(files.coco, coco_file(name, (height, width), queries, annotations))
    return summary


def _write_rasters(
    files: PredictionFiles,
    source: Path,
    queries: Sequence[str],
    label: Int[np.ndarray, "h w"],
    colors: UInt8[np.ndarray, "q 3"],
) -> None:
    """Writes the GeoTIFFs: `label` as one band, and a band of every query's probability PNG."""
    labels, soft_masks = files.rasters
    small = len(queries) <= 255
    index = np.where(label < 0, 255 if small else 65535, label)
    meaning = ", ".join(f"{k} {query}" for k, query in enumerate(queries))
    write_raster(
        labels, source, [index.astype(np.uint8 if small else np.uint16)], [meaning],
        nothing=255 if small else 65535, colors=colors if small else None,
    )  # fmt: skip

    # The PNGs are read back one at a time.
    planes = (np.asarray(Image.open(files.probability(k))) for k in range(len(queries)))
    write_raster(soft_masks, source, planes, queries)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes JSON that people read, too."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def coco_file(
    name: str, shape: tuple[int, int], queries: Sequence[str], annotations: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Content of a COCO file of one image; shape: its height and width, pixels."""
    return {
        "images": [{"id": 1, "file_name": name, "height": shape[0], "width": shape[1]}],
        "categories": [{"id": k + 1, "name": query} for k, query in enumerate(queries)],
        "annotations": list(annotations),
    }


def coco_annotation(place: int, soft: Float[np.ndarray, "h w"]) -> list[dict[str, Any]]:
    """COCO annotation of a query's mask, the pixels above 0.5; none for an empty mask.

    place: index of the query. Its score is the mean probability of the mask's pixels.
    """
    mask = soft > SHOWN
    if not mask.any():
        return []

    # The box is [left, top, width, height].
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = int(rows[0]), int(columns[0])
    box = [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]
    return [{
        "id": place + 1,
        "image_id": 1,
        "category_id": place + 1,
        "segmentation": {"size": list(mask.shape), "counts": rle.encode(mask)},
        "area": int(mask.sum()),
        "bbox": box,
        "iscrowd": 0,
        "score": float(soft.mean(where=mask, dtype=np.float64)),
    }]  # fmt: skip


def _write_mask(files: PredictionFiles, place: int, query: str, soft: np.ndarray) -> dict[str, Any]:
    """Writes the two PNGs of a query; returns its row of the summary, with shares as 0..1."""
    mask = soft > SHOWN
    Image.fromarray(mask.astype(np.uint8) * 255).save(files.mask(place), "PNG")
    viz.save_mask(files.probability(place), soft)
    row = {"query": query, "mask": files.mask(place).name, "coverage": float(mask.mean())}
    return row | {"highest": float(soft.max())}


def query_colors(
    queries: Sequence[str], datasets: Sequence[str] = (), vocabulary: str | None = None
) -> UInt8[np.ndarray, "q 3"]:
    """RGB of each query: of a class its official color, of other words one far from the others'.

    A class is one of the vocabulary (see `find_queries`), or else of one of the data sets.
    """
    # A file comes before a data set of the same name, as in `find_queries`.
    own: dict[str, Color | None] = {}
    if vocabulary and (path := expanded(vocabulary)).is_file():
        own = {info.name: info.color for info in read_class_list(path).classes}
    elif vocabulary:
        datasets = (vocabulary, *datasets)

    named = registry.official_colors(queries, datasets)
    official = [own.get(q) or color for q, color in zip(queries, named, strict=True)]
    if len(queries) == 1 and official[0] is None:
        return ONE_COLOR
    return viz.class_colors(len(queries), queries, official)


def overlay(
    image: UInt8[np.ndarray, "h w 3"],
    queries: Sequence[str],
    label: Int[np.ndarray, "h w"],
    colors: UInt8[np.ndarray, "q 3"],
) -> UInt8[np.ndarray, "h2 w 3"]:
    """The image tinted by a label map of queries (-1: not tinted), with a legend below."""
    painted = viz.overlay(image, label, colors, alpha=0.5)

    # The legend lists the queries that won some pixel, or all if none did.
    shown = [q for q in range(len(queries)) if (label == q).any()] or list(range(len(queries)))
    names = [queries[q] for q in shown]
    strip = viz.legend(names, colors[shown], width=image.shape[1], numbers=shown)
    return np.concatenate([painted, strip])
