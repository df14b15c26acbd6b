# SPDX-License-Identifier: Apache-2.0
"""Reads exports of labeling tools in COCO's form: polygons and run-length masks in a JSON file.

    SPLIT/_annotations.coco.json           Roboflow; the images lie beside it
    annotations/instances_SPLIT.json       COCO, CVAT; images in images/SPLIT, images or SPLIT
    result.json or annotations.json        Label Studio, labelme2coco; the images lie below it

Class 0 is the background: what no annotation covers. Where annotations overlap, the smaller one is on
top. A pixel belongs to a polygon if its center does. The images of a single file, and of
`instances_default`, have no splits: they are split into `pairs.DIVIDED`.
"""

from __future__ import annotations

import functools
import unicodedata
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from digseg_jax.data.datasets.decode import SizeError
from digseg_jax.data.datasets.pairs import DIVIDED, FileSource, Pair, walk_files
from digseg_jax.data.datasets.readers import polygons, rle
from digseg_jax.data.datasets.spec import ClassInfo, DatasetSpec
from digseg_jax.errors import UserError
from digseg_jax.io.files import UnreadableError, shown
from digseg_jax.io.image_file import IMAGE_ENDINGS
from digseg_jax.io.json_file import check_keys, read_json
from digseg_jax.io.names import UNSEEN

BACKGROUND = "background"
_ROBOFLOW = "_annotations.coco.json"
_INSTANCES = "annotations/instances_*.json"
_SINGLE = ("result.json", "annotations.json", _ROBOFLOW)
_MOST_POINTS = 1_000_000  # numbers of a polygon


def annotation_files(root: Path) -> dict[str, Path]:
    """The annotation file of each split; empty if the folder is not such an export."""
    found = {path.parent.name: path for path in sorted(root.glob(f"*/{_ROBOFLOW}"))}
    found = found or {
        path.stem.removeprefix("instances_"): path for path in sorted(root.glob(_INSTANCES))
    }
    single = next((root / name for name in _SINGLE if (root / name).is_file()), None)
    if not found and single:
        found = {"default": single}

    # CVAT's name for what was not split.
    return dict.fromkeys(DIVIDED, found["default"]) if set(found) == {"default"} else found


def coco_classes(files: Sequence[Path]) -> tuple[ClassInfo, ...]:
    """Classes of an export: the background, then the categories by their ids.

    Raises:
      UserError: no categories, or files that disagree about them.
    """
    used = {row["category_id"] for path in files for row in _read(path)["annotations"]}
    lists = [_categories(path, used) for path in files]
    for path, names in zip(files[1:], lists[1:], strict=True):
        if names != lists[0]:
            raise UserError(f"{shown(path)}: its categories differ from those of {shown(files[0])}")

    # The background has no id; COCO's own begin at 1, but Roboflow's at 0.
    rest = [ClassInfo(name, raw=(number + 1,)) for number, name in sorted(lists[0].items())]
    return (ClassInfo(BACKGROUND, raw=(0,)), *rest)


def _categories(path: Path, used: set[int]) -> dict[int, str]:
    """Names of the categories by id, without the headings above them and without a background.

    used: ids of the categories that the export's annotations have.

    Raises:
      UserError: none, or two of one name.
    """
    values = _read(path)
    above = {
        str(row.get("supercategory"))
        for row in values["categories"]
        if row.get("supercategory") != row["name"]  # a class may be its own heading, as COCO's person
    }
    names = {
        row["id"]: row["name"].strip()
        for row in values["categories"]
        if row["id"] in used or row["name"] not in above  # Roboflow lists its heading as category 0
    }
    names = {number: name for number, name in names.items() if name.lower() != BACKGROUND}
    if not names or len({name.lower() for name in names.values()}) < len(names):
        raise UserError(
            f"{shown(path)}: {'two categories have one name' if names else 'no categories'}"
        )
    return names


@functools.lru_cache(maxsize=8)
def _read(path: Path) -> dict[str, Any]:
    """The content of an annotation file.

    Raises:
      UserError: no JSON of COCO's form; names the entry.
    """
    kinds: dict[str, dict[str, Any]] = {
        "categories": {"id": int, "name": str},
        "images": {"id": int, "file_name": str, "height": int, "width": int},
        "annotations": {"image_id": int, "category_id": int, "segmentation": (list, dict)},
    }
    values = read_json(path, dict.fromkeys(kinds, list))
    for key, kind in kinds.items():
        for place, row in enumerate(values[key]):
            try:
                if not isinstance(row, dict):
                    raise ValueError("is not an object")
                check_keys(row, kind)
            except ValueError as error:
                raise UserError(f"{shown(path)}: {key}[{place}]: {error}") from error
    _check_references(path, values)
    return values


def _check_references(path: Path, values: dict[str, Any]) -> None:
    """Checks that numbers and names occur once, and that annotations name what is listed.

    Otherwise one entry would silently replace another, or its pixels become background.

    Raises:
      UserError: names the entry.
    """
    unique = (("categories", "id"), ("images", "id"), ("images", "file_name"))
    for key, field in unique:
        seen = set()
        for place, row in enumerate(values[key]):
            if row[field] in seen:
                raise UserError(f"{shown(path)}: {key}[{place}]: a second {field} {row[field]!r}")
            seen.add(row[field])

    for place, row in enumerate(values["categories"]):
        if not row["name"].strip() or UNSEEN.search(row["name"]):
            raise UserError(f"{shown(path)}: categories[{place}]: {row['name']!r} is not a name")

    listed = {key: {row["id"] for row in values[key]} for key in ("images", "categories")}
    for place, row in enumerate(values["annotations"]):
        for field, key in (("image_id", "images"), ("category_id", "categories")):
            if listed[key] and row[field] not in listed[key]:
                raise UserError(
                    f"{shown(path)}: annotations[{place}]: no entry of {key} has the {field} "
                    f"{row[field]}"
                )


class CocoSource(FileSource):
    """Examples of one annotation file; labels are painted from its annotations."""

    def __init__(self, spec: DatasetSpec, root: Path, path: Path):
        values = _read(path)
        rows = {row["id"]: row for row in values["images"]}
        self.ids = {c.raw[0] - 1: i for i, c in enumerate(spec.classes) if i}
        self.annotations: dict[str, list[dict[str, Any]]] = {}
        for row in values["annotations"]:
            if row["image_id"] in rows and row["category_id"] in self.ids:
                name = rows[row["image_id"]]["file_name"]
                self.annotations.setdefault(name, []).append(row)

        # Images without an annotation are examples too: of the background.
        self.sizes = {row["file_name"]: (row["height"], row["width"]) for row in rows.values()}
        places = _find(root, path, sorted(self.sizes))
        label = path.relative_to(root).as_posix()
        pairs = [Pair(name, place, label) for name, place in places.items()]
        super().__init__(root, pairs, None, strict=True)

    def label(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """Ids, int32 [h, w]: 0 where nothing is annotated.

        Raises:
          SizeError: the file gives another size than the image has.
          UnreadableError: an annotation that is neither polygons nor runs.
        """
        name = self.pairs[index].name
        where = f"{self.files(index)['label']}: {name}"
        if self.sizes[name] not in (size, size[::-1]):
            raise SizeError(f"{where}: (height, width) is {self.sizes[name]}, the image has {size}")

        # The smaller on top: a button on a coat would vanish below it. One mask at a time is in memory.
        label = np.zeros(self.sizes[name], np.int32)
        for row in sorted(self.annotations.get(name, []), key=_area, reverse=True):
            label[_mask(row, label.shape, where)] = self.ids[row["category_id"]]
        return label


def _area(row: dict[str, Any]) -> float:
    """Pixels of an annotation; 0 for a broken one, about which `_mask` complains."""
    found = row["segmentation"]
    try:
        if isinstance(found, dict):
            counts = found["counts"]
            return float(sum((rle.unpack(counts) if isinstance(counts, str) else counts)[1::2]))

        # The shoelace formula.
        area = 0.0
        for numbers in found:
            x, y = np.asarray(numbers, np.float64).reshape(-1, 2).T
            area += float(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
        return area
    except (ValueError, TypeError, KeyError, OverflowError):
        return 0.0


def _mask(row: dict[str, Any], size: tuple[int, ...], where: str) -> np.ndarray:
    """One annotation as a mask, bool [h, w].

    Raises:
      UnreadableError: neither polygons nor runs.
    """
    found = row["segmentation"]
    try:
        if isinstance(found, dict):
            if tuple(found["size"]) != size:
                raise ValueError(f"runs for a mask of {found['size']}, the image is {list(size)}")
            return rle.decode(found["counts"], size[0], size[1])

        if not found:
            raise ValueError("a box without an outline; export polygons or masks")

        # Corners count from the corner of the first pixel, centers lie half a pixel further.
        mask = np.zeros(size, bool)
        for numbers in found:
            if not 6 <= len(numbers) <= _MOST_POINTS or len(numbers) % 2:
                raise ValueError(f"a polygon of {len(numbers)} numbers")
            if not all(isinstance(number, int | float) for number in numbers):
                raise ValueError("a polygon of other things than numbers")
            points = np.asarray(numbers, np.float64).reshape(-1, 2)
            if not (np.abs(points) <= 1e6).all():
                raise ValueError("a polygon far outside the image")
            polygons.fill(mask, points - 0.5)
        return mask
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise UnreadableError(f"{where}: annotation {row.get('id')}: {error}") from error


def _find(root: Path, path: Path, names: Sequence[str]) -> dict[str, str]:
    """Places of the images, relative to root, by the names that the annotation file gives them.

    Raises:
      UserError: an image that is not there, one that is in two places, or two that are one file.
    """
    # The narrowest folder that has images; every image in it by its bare name.
    folder = path.parent if path.parent.name != "annotations" else root
    split = path.stem.removeprefix("instances_")
    narrower = [folder / "images" / split, folder / split, folder / "images", folder]
    base, files = folder, list[Path]()
    for base in narrower:
        if files := list(walk_files(base, IMAGE_ENDINGS)) if base.is_dir() else []:
            break
    found: dict[str, list[str]] = {}
    for file in files:
        place = (base / file).relative_to(root).as_posix()
        found.setdefault(_spelled(file.name), []).append(place)
    inside = base.relative_to(root).as_posix()

    places: dict[str, str] = {}
    for name in names:
        own = _places_of(name, found, inside)
        if len(own) != 1:
            what = "is in two places" if own else "is not there"
            raise UserError(f"{shown(path)}: the image {name!r} {what}, under {shown(base)}")
        places[name] = own[0]

    # Videos number their frames alike: an image that was not copied must not get another one's masks.
    owners: dict[str, str] = {}
    for name, place in places.items():
        if (other := owners.setdefault(place, name)) != name:
            raise UserError(
                f"{shown(path)}: of the images {other!r} and {name!r} there is only one, "
                f"{shown(root / place)}"
            )
    return places


def _places_of(name: str, found: dict[str, list[str]], base: str) -> list[str]:
    """Files that a name of the annotation file may mean.

    Tools write the bare name, a path from some folder above, or an address with %20 for a space.

    found: bare name, as `_spelled` has it -> files with that name, relative to the root. base: the
      folder of the images, to which a name may be relative; "." for the root.
    """
    for text in dict.fromkeys((name, urllib.parse.unquote(name))):
        wanted = _spelled(text).lstrip("/")
        own = found.get(wanted.rsplit("/", 1)[-1], [])

        # The whole path, then one that ends with it, then the only file of this name.
        paths = (wanted, wanted if base == "." else f"{base}/{wanted}")
        same = [place for place in own if _spelled(place) in paths]
        ends = [place for place in own if f"/{_spelled(place)}".endswith(f"/{wanted}")]
        if match := same or ends or (own if len(own) == 1 else []):
            return match
    return []


def _spelled(name: str) -> str:
    """A name with forward slashes and composed letters: archives from macOS have them decomposed."""
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


def open_coco_json(spec: DatasetSpec, root: Path, split: str) -> CocoSource:
    """Opens a split of an export in COCO's form."""
    return CocoSource(spec, root, annotation_files(root)[split])
