# SPDX-License-Identifier: Apache-2.0
"""Gallery of a page: a legend, and one card per image with its masks; gallery.html.j2 draws it."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from digseg_jax.errors import UserError
from digseg_jax.viz.colors import IGNORE_COLOR
from digseg_jax.viz.templates import is_number

_KINDS = {"typical": 0, "worst": 1, "best": 2}  # kind of an image -> its place on the page
QUALITY = 75  # of photos and soft masks, 0..100
_AGREE, _DIFFER = (233, 229, 220), (196, 62, 28)  # RGB in an error map: pale, vermilion


class DataImage(NamedTuple):
    """An image as a data URI, and its size in pixels."""

    uri: str
    width: int
    height: int


def load_image(folder: Path, name: Any, kind: str) -> DataImage:
    """A PNG of the gallery folder as a data URI of WebP, with the PNG's size.

    kind: "photo"; "labels", whose colors are kept exactly, as the script reads classes from them; or
      "mask", at half the size.

    Raises:
      UserError: the file is missing, not a PNG, or not directly in the folder.
    """
    if not isinstance(name, str) or Path(name).name != name:
        raise UserError(f"gallery image {name!r} must be the plain name of a file in {folder}")
    try:
        with Image.open(folder / name, formats=["PNG"]) as opened:
            image = opened.convert("L" if kind == "mask" else "RGB")
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise UserError(f"gallery image {folder / name} is missing or not a PNG") from error

    # A soft mask has the detail of its latent, an eighth of the image's: half the size shows all of it.
    width, height = image.size
    if kind == "mask":
        image = image.reduce(2)
    return DataImage(_uri(image, exact=kind == "labels"), width, height)


def _uri(image: Image.Image, *, exact: bool) -> str:
    """Data URI of an image as WebP; exact: without loss."""
    data = BytesIO()
    image.save(data, "WEBP", lossless=exact, quality=QUALITY)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode("ascii")


def error_map(prediction: Path, truth: Path) -> DataImage:
    """Draws where two label images differ (vermilion) and agree (pale); gray where not labeled.

    Raises:
      UserError: the images differ in size.
    """
    with Image.open(prediction) as a, Image.open(truth) as b:
        guess, target = (np.asarray(side.convert("RGB")) for side in (a, b))
    if guess.shape != target.shape:
        raise UserError(f"gallery images {prediction} and {truth} differ in size")

    # Label images are colored by class, so equal colors mean equal classes.
    ignored = (target == IGNORE_COLOR).all(axis=-1)
    index = np.where(ignored, 2, (guess != target).any(axis=-1)).astype(np.uint8)

    shown = Image.fromarray(np.array([_AGREE, _DIFFER, IGNORE_COLOR], np.uint8)[index])
    return DataImage(_uri(shown, exact=True), shown.width, shown.height)


@dataclasses.dataclass(frozen=True)
class Thumb:
    """A small image that can be put on the right side of a card's slider.

    Attributes:
      kind: "labels", or "mask" of a query.
      what: what it shows, for the script and for screen readers.
      name: caption; of a mask, the query.
      pressed: shown at first.
      iou: of a mask; may be no number.
      color: of the class that a query names, #rrggbb; empty: it has none.
    """

    image: DataImage
    kind: str
    what: str
    name: str
    pressed: bool = False
    iou: Any = None
    color: str = ""

    @property
    def tint(self) -> str:
        """Color of a mask on the page."""
        return (self.color or "#ffffff") if self.kind == "mask" else ""


def card(
    item: Mapping[str, Any], index: int, folder: Path, colors: Mapping[str, str]
) -> dict[str, Any]:
    """One image: both sides of its slider, and the small images to choose the right side from.

    Raises:
      UserError: an image file is missing or not a PNG.
    """

    def load(name: Any, kind: str) -> DataImage:
        return load_image(folder, name, kind)

    # The four images that every card has; the error map is made here.
    photo = load(item["image"], "photo")
    prediction, truth = load(item["prediction"], "labels"), load(item["label"], "labels")
    wrong = error_map(folder / item["prediction"], folder / item["label"])
    maps = {"prediction": prediction, "truth": truth, "errors": wrong}

    # Classes to filter by; a gallery without them lists the queries that have an IoU.
    queries = item.get("queries", [])
    present = item.get("classes")
    if present is None:
        present = [q["name"] for q in queries if is_number(q.get("iou"))]

    return {
        "name": str(item["id"]),
        "index": index,
        "kind": item.get("kind") or "",
        "miou": item.get("miou"),
        "classes": json.dumps(present),
        "photo": photo,
        "prediction": prediction,
        "maps": [Thumb(img, "labels", what, what, img is prediction) for what, img in maps.items()],
        "masks": [_mask(query, load(query["mask"], "mask"), colors) for query in queries],
    }


def _mask(query: Mapping[str, Any], image: DataImage, colors: Mapping[str, str]) -> Thumb:
    """A query's mask."""
    name = str(query["name"])
    return Thumb(
        image, "mask", f"mask of “{name}”", name, iou=query.get("iou"), color=colors.get(name, "")
    )


def gallery_cards(
    gallery: Mapping[str, Any], folder: Path, colors: Mapping[str, str], title: str = "Held-out images"
) -> dict[str, Any] | None:
    """The gallery's cards and legend; None if it has no items.

    Raises:
      UserError: an image is missing.
    """
    items = list(enumerate(gallery.get("items") or []))
    if not items:
        return None

    # Typical images first, as they show most; the script restores the order of the split.
    items.sort(key=lambda entry: _KINDS.get(entry[1].get("kind"), len(_KINDS)))
    return {
        "title": title,
        "ranked": any(item.get("kind") for _, item in items),
        "legend": [(entry["name"], colors[entry["name"]]) for entry in gallery.get("classes", [])],
        "cards": [card(item, i, folder, colors) for i, item in items],
    }
