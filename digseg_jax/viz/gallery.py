# SPDX-License-Identifier: Apache-2.0
"""Writes the gallery of held-out images: PNG files and gallery.json, which the report shows."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from digseg_jax.arraytypes import Float, Int, UInt8
from digseg_jax.errors import UserError
from digseg_jax.io.json_file import read_json
from digseg_jax.viz import images

GALLERY_NAME = "gallery.json"
EDGE = 6  # pixels of color before a mask of a strip


@dataclasses.dataclass(frozen=True)
class GalleryItem:
    """One held-out image with what was asked and what came out.

    image: uint8 photo. label, prediction: class indices, -1 = ignored. masks: probabilities 0..1,
    one a query. queries: their texts. ious: IoU of each query on this image, None if undefined.
    miou: mean IoU on this image; the mean of the defined `ious` if left out. kind: "worst", "typical"
    or "best" of the split; "" for another one.
    """

    id: str
    image: UInt8[np.ndarray, "h w 3"]
    label: Int[np.ndarray, "h w"]
    prediction: Int[np.ndarray, "h w"]
    masks: Float[np.ndarray, "q h w"]
    queries: Sequence[str]
    ious: Sequence[float | None]
    miou: float | None = None
    kind: str = ""


def write_gallery(
    out: Path | str,
    items: Iterable[GalleryItem],
    classes: Sequence[str],
    colors: UInt8[np.ndarray, "n 3"] | None = None,
) -> Path:
    """Writes PNGs and gallery.json into `out`, replacing an earlier gallery; returns the JSON file.

    classes: names in label order; colors: theirs, `class_colors` if left out.

    Raises:
      UserError: an item's arrays do not fit each other or the classes.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if colors is None:
        colors = images.class_colors(len(classes), classes)

    # Files of an earlier gallery could outlive it where that had more items.
    for old in (out / GALLERY_NAME, *out.glob("[0-9][0-9][0-9][0-9]_*.png")):
        old.unlink(missing_ok=True)

    rows = [_write_item(out, i, item, classes, colors) for i, item in enumerate(items)]
    table = [
        {"name": name, "color": images.to_hex(color)}
        for name, color in zip(classes, colors, strict=True)
    ]

    # Written beside and moved, so that a reader never sees half a file.
    scratch = out / (GALLERY_NAME + ".tmp")
    text = json.dumps({"classes": table, "items": rows}, indent=1, allow_nan=False)
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, out / GALLERY_NAME)
    return out / GALLERY_NAME


def _write_item(
    out: Path, index: int, item: GalleryItem, classes: Sequence[str], colors: np.ndarray
) -> dict[str, Any]:
    """Writes an item's PNGs; returns its row of gallery.json."""
    _check(item)

    names = {kind: f"{index:04d}_{kind}.png" for kind in ("image", "label", "prediction")}
    images.save_photo(out / names["image"], item.image)
    images.save_label(out / names["label"], item.label, colors)
    images.save_label(out / names["prediction"], item.prediction, colors)

    queries: list[dict[str, Any]] = []
    for k, (name, mask, iou) in enumerate(zip(item.queries, item.masks, item.ious, strict=True)):
        file = f"{index:04d}_mask_{k}.png"
        images.save_mask(out / file, mask)
        queries.append({"name": name, "mask": file, "iou": _number(iou)})

    # The item's own mean, if it has one, else that of its defined IoUs.
    defined = [q["iou"] for q in queries if q["iou"] is not None]
    mean = float(np.mean(defined)) if defined else None
    seen = np.union1d(np.unique(item.label), np.unique(item.prediction))
    return {
        "id": item.id,
        **names,
        "queries": queries,
        "miou": mean if item.miou is None else _number(item.miou),
        "kind": item.kind,
        "classes": [classes[int(c)] for c in seen if c >= 0],  # what the page filters by
    }


def gallery_strips(folder: Path) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
    """One image for each item of a written gallery: photo, truth, prediction and masks, side by side.

    By name "masks/ID"; a mask's left edge is in the color of its query.
    """
    path = folder / GALLERY_NAME
    if not path.exists():
        return {}
    found = read_json(path)
    colors = {entry["name"]: images.from_hex(entry["color"]) for entry in found["classes"]}

    strips = {}
    for item in found["items"]:
        parts = [_read(folder / item[kind]) for kind in ("image", "label", "prediction")]
        for query in item["queries"]:
            edge = np.full((len(parts[0]), EDGE, 3), colors[query["name"]], np.uint8)
            parts += [edge, _read(folder / query["mask"])]
        strips[f"masks/{item['id']}"] = np.concatenate(parts, axis=1)
    return strips


def _read(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels of one of the gallery's PNGs."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _number(value: float | None) -> float | None:
    """A finite float, else None: JSON has no nan."""
    return float(value) if value is not None and math.isfinite(value) else None


def _check(item: GalleryItem) -> None:
    """Raises UserError unless the item's parts fit each other."""
    place = f"gallery item {item.id!r}"
    label, prediction = np.shape(item.label), np.shape(item.prediction)
    masks = np.shape(item.masks)
    if label != prediction:
        raise UserError(f"{place}: label map {label} and prediction {prediction} differ in shape")
    if len(masks) != 3 and len(item.queries):
        raise UserError(f"{place}: masks have shape {masks}; they must be [queries, h, w]")
    counts = (len(item.queries), len(item.masks), len(item.ious))
    if len(set(counts)) != 1:
        raise UserError(f"{place}: {counts} queries, masks and ious; the numbers must be equal")
