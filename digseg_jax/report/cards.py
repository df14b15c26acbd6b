# SPDX-License-Identifier: Apache-2.0
"""Gallery of the page: a toolbar with legend and filter, and one card per image."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from digseg_jax.errors import UserError
from digseg_jax.report.markup import MANY, esc, is_number, number, search_field, section
from digseg_jax.viz.colors import IGNORE_COLOR

DataImage = tuple[str, int, int]  # data URI, width, height

_KINDS = {"typical": 0, "worst": 1, "best": 2}  # kind of an image -> its place on the page
QUALITY = 75  # of photos and soft masks, 0..100
_AGREE, _DIFFER = (233, 229, 220), (196, 62, 28)  # RGB in an error map: pale, vermilion


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
    return _uri(image, exact=kind == "labels"), width, height


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
    return _uri(shown, exact=True), shown.width, shown.height


def _img(shown: DataImage, alt: str, kind: str) -> str:
    """An <img> element with its size, so that the page does not jump while loading."""
    uri, width, height = shown
    return f'<img class="{kind}" src="{uri}" width="{width}" height="{height}" alt="{esc(alt)}">'


def _thumb(
    shown: DataImage, kind: str, what: str, where: str, extra: str, pressed: bool, tint: str = ""
) -> str:
    """A button that puts its image on the right side of the slider; masks have a tint.

    Args:
      kind: CSS class of the image.
      what: what the image shows, for the script and for screen readers.
      where: the card's title.
      extra: caption, ready HTML.
      pressed: shown at first.
    """
    style = f' style="--tint:{tint}"' if tint else ""
    image = _img(shown, f"{what}, {where}", kind)
    return (
        f'<button type="button" class="thumb" data-what="{esc(what)}" aria-pressed='
        f'"{str(pressed).lower()}"><span class="pic"{style}>{image}'
        f'</span><span class="caption">{extra}</span></button>'
    )


def stage(photo: DataImage, prediction: DataImage, where: str) -> str:
    """The slider: input on the left, a label image or mask on the right, a movable line between."""
    return (
        f'<div class="stage" style="aspect-ratio:{photo[1]}/{photo[2]}">'
        f"{_img(photo, f'input, {where}', 'photo')}"
        f'<div class="layer">{_img(prediction, f"prediction, {where}", "labels")}</div>'
        '<span class="tag left" aria-hidden="true">input</span>'
        '<span class="tag right" aria-hidden="true">prediction</span>'
        f'<div class="handle" role="slider" tabindex="0" aria-orientation="horizontal" '
        f'aria-label="{esc(f"Share of the input shown, {where}")}" aria-valuemin="0" '
        'aria-valuemax="100" aria-valuenow="50" aria-valuetext="50 % input, 50 % prediction">'
        "<span></span></div></div>"
    )


def card(item: Mapping[str, Any], index: int, folder: Path, colors: Mapping[str, str]) -> str:
    """One image: a slider between input and prediction, and thumbnails to choose the right side from.

    Raises:
      UserError: an image file is missing or not a PNG.
    """
    where = str(item["id"])

    def load(name: Any, kind: str) -> DataImage:
        return load_image(folder, name, kind)

    # The four images that every card has; the error map is made here.
    photo = load(item["image"], "photo")
    prediction, truth = load(item["prediction"], "labels"), load(item["label"], "labels")
    wrong = error_map(folder / item["prediction"], folder / item["label"])
    maps = _thumb(prediction, "labels", "prediction", where, "prediction", True)
    maps += _thumb(truth, "labels", "truth", where, "truth", False)
    maps += _thumb(wrong, "labels", "errors", where, "errors", False)

    # One mask for each query that was kept.
    masks = "".join(_mask(query, where, load, colors) for query in item.get("queries", []))

    # Classes to filter by; a gallery without them lists the queries that have an IoU.
    present = item.get("classes")
    if present is None:
        present = [q["name"] for q in item.get("queries", []) if is_number(q.get("iou"))]

    # The script sorts by the score, which may be empty.
    score = item["miou"] if is_number(item.get("miou")) else ""
    kind = item.get("kind") or ""
    badge = f'<span class="kind {esc(kind)}">{esc(kind)}</span>' if kind else ""
    return (
        f'<article class="card" data-index="{index}" data-miou="{score}" data-kind="{esc(kind)}"'
        f' data-classes="{esc(json.dumps(present))}" aria-labelledby="item-{index}">'
        f'<header><h3 id="item-{index}">{esc(where)}</h3>{badge}'
        f'<p class="score">mIoU {number(item.get("miou"))}</p></header>'
        f"{stage(photo, prediction, where)}"
        '<p class="under" aria-hidden="true"></p>'
        f'<div role="group" aria-label="Right side of the slider, {esc(where)}">'
        f'<div class="maps">{maps}</div><div class="masks">{masks}</div></div></article>'
    )


def _mask(
    query: Mapping[str, Any],
    where: str,
    load: Callable[[Any, str], DataImage],
    colors: Mapping[str, str],
) -> str:
    """Thumbnail of a query's mask, tinted in its class's color, with its IoU."""
    name = str(query["name"])
    color = colors.get(name)
    dot = f'<span class="dot" style="background:{color}"></span>' if color else ""
    extra = f'<span class="word">{dot}{esc(name)}</span>{number(query.get("iou"), 2)}'
    what, tint = f"mask of “{name}”", color or "#ffffff"
    return _thumb(load(query["mask"], "mask"), "mask", what, where, extra, False, tint)


def _toolbar(names: Sequence[str], colors: Mapping[str, str], *, ranked: bool) -> str:
    """Legend, filter by class, choice of the compared image, opacity, and order.

    ranked: whether some images are known as the typical, worst and best of their split.
    """
    chips = ['<button type="button" class="chip" data-class="" aria-pressed="true">all</button>']
    chips += [
        f'<button type="button" class="chip" data-class="{esc(name)}" aria-pressed="false">'
        f'<span class="dot" style="background:{colors[name]}"></span>{esc(name)}</button>'
        for name in names
    ]
    find = search_field(".chip:not([data-class=''])") if len(names) > MANY else ""

    # What all sliders show on their right side.
    sides = "".join(
        f'<label><input type="radio" name="side" autocomplete="off" value="{what}"{checked}>'
        f"<span>{what}</span></label>"
        for what, checked in (("prediction", " checked"), ("truth", ""), ("errors", ""))
    )

    # The first order is the one of the page as it is delivered.
    orders = {"kind": "typical, worst, best"} if ranked else {}
    orders |= {"given": "as in the split", "worst": "worst first", "best": "best first"}
    options = "".join(f'<option value="{value}">{text}</option>' for value, text in orders.items())

    return (
        f'<div class="toolbar">{find}<div class="chips" role="group" '
        f'aria-label="Legend; choose a class to see only images with it">{"".join(chips)}'
        '<span class="key"><span class="dot ignored"></span>not labeled</span></div>'
        f'<div class="controls"><fieldset class="side"><legend>Compare input with</legend>{sides}'
        '</fieldset><label class="sort">Opacity <input type="range" id="opacity" min="10" max="100" '
        'value="100" autocomplete="off"></label>'
        f'<label class="sort">Order <select id="sort" autocomplete="off">{options}</select></label>'
        '<output id="shown" aria-live="polite"></output></div></div>'
    )


def gallery_section(
    gallery: Mapping[str, Any], folder: Path, colors: Mapping[str, str], title: str = "Held-out images"
) -> str:
    """Section of the gallery; empty if it has no items.

    Raises:
      UserError: an image is missing.
    """
    items = list(enumerate(gallery.get("items") or []))
    if not items:
        return ""

    # Typical images first, as they show most; the script restores the order of the split.
    ranked = any(item.get("kind") for _, item in items)
    items.sort(key=lambda entry: _KINDS.get(entry[1].get("kind"), len(_KINDS)))
    cards = "".join(card(item, i, folder, colors) for i, item in items)
    names = [entry["name"] for entry in gallery.get("classes", [])]
    lead = (
        "Drag the line, or focus it and use the arrow keys. Point at a place to read its true and its "
        "predicted class; T puts the whole truth on the right. Choose a small image to put it on "
        "the right: the truth, where the two differ, or the soft mask of one query (bright: "
        "certain) with its IoU; arrow keys move between the small images."
    )
    return section("gallery", title, _toolbar(names, colors, ranked=ranked)
                   + f'<div class="cards">{cards}</div>', lead)  # fmt: skip
