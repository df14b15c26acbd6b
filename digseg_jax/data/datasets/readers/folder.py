# SPDX-License-Identifier: Apache-2.0
"""Reads a user's own data: images/SPLIT/NAME.jpg, masks/SPLIT/NAME.png and classes.txt.

SPLIT/images and SPLIT/masks are read too, as are the other names of the two folders in `IMAGES` and
`MASKS`, in capitals or not. Masks may be in subfolders named as those of the images, and be called
NAME_mask.png, mask_NAME.png or NAME.jpg.png. `class_list` describes the lines of classes.txt. 255 is
ignored unless a line gives it a meaning. Of images/NAME.jpg and masks/NAME.png, which have no
splits, a fifth is "val" and the rest "train".

Exports in Pascal VOC's form, as CVAT makes them, are read as they are: JPEGImages, SegmentationClass,
labelmap.txt with names and colors, ImageSets/Segmentation/SPLIT.txt (if all are in "default", they
have no splits). Exports in COCO's form are read by `coco_json`.
"""

from __future__ import annotations

import re
import unicodedata
from functools import partial
from pathlib import Path

import numpy as np

from digseg_jax.data.datasets.class_list import COLOR, read_class_list, read_label_map, written
from digseg_jax.data.datasets.decode import LabelValueError, read_color_label
from digseg_jax.data.datasets.pairs import (
    DIVIDED,
    FileSource,
    divide,
    is_junk,
    list_folders,
    pair_up,
    pick,
    walk_files,
)
from digseg_jax.data.datasets.readers.coco_json import (
    annotation_files,
    coco_classes,
    open_coco_json,
)
from digseg_jax.data.datasets.readers.index import IndexLabels
from digseg_jax.data.datasets.spec import IGNORE, ClassInfo, DatasetSpec
from digseg_jax.data.datasets.splits import split_called
from digseg_jax.errors import UserError
from digseg_jax.io.files import read_lines, shown
from digseg_jax.io.image_file import IMAGE_ENDINGS

CLASSES = "classes.txt"
# Names of the two folders, in small letters; the first that exists is taken.
IMAGES = ("images", "image", "imgs", "img", "img_dir")
MASKS = (
    "masks", "mask", "annotations", "annotation", "labels", "label", "ann_dir", "gt", "groundtruth",
)  # fmt: skip
# What such a list is called by other systems and habits.
_NEARLY_CLASSES = r"(classes|class|class_names|labels|names)(\.txt)?(\.txt|\.csv|\.names)?"
LABEL_MAP = "labelmap.txt"
VOC_IMAGES, VOC_MASKS = "JPEGImages", "SegmentationClass"
VOC_LISTS = "ImageSets/Segmentation"
VOID = 255  # ignored value of number masks, unless a line of classes.txt gives it a meaning
_MASK_ENDINGS = (".png", ".tif", ".tiff", ".bmp")
_LOSSY = (".jpg", ".jpeg", ".webp")
# What tools add to the stem of a mask or of an image: behind it, before it, or the image's own ending.
_MASK_WORDS = r"(?:masks?|labels?|seg|gt|annotations?)"
_MARKS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"[_-]{_MASK_WORDS}$", rf"(?<![^/]){_MASK_WORDS}[_-]", r"(?<![^/])(?:images?|imgs?)[_-]",
        r"_L$", r"\.(?:jpe?g|png|tiff?|bmp|webp)$",
    )
)  # fmt: skip
_VOC = (
    "a VOC-style export without labelmap.txt: move JPEGImages to images/train, SegmentationClass to "
    "masks/train"
)
_BESIDE = "train beside {0}: move train to images/train, and {0} to masks/train"
_NOT_SPLIT = ", without splits: a fifth of its images, chosen by their names, are val"
# Files of other layouts -> whose layout it is, and what to do. "**/" stands for `_DEPTHS`.
_OTHERS = {
    LABEL_MAP: "CVAT's labelmap.txt: write its colors into classes.txt, as in `#ff0000: road`",
    "SegmentationClass": _VOC,
    "JPEGImages": _VOC,
    "train_masks": _BESIDE.format("train_masks"),
    "trainannot": _BESIDE.format("trainannot"),
    f"*/{CLASSES}": f"a folder above the data: name the folder that holds {CLASSES}",
    "**/data.yaml": "an export for YOLO, without masks: export semantic masks (PNG) instead",
    "labels/**/*.txt": "an export for YOLO, without masks: export semantic masks (PNG) instead",
    "annotations.xml": "CVAT's own XML: export `Segmentation mask` or COCO instead",
    "meta.json": "a project of Supervisely: export COCO or semantic masks (PNG) instead",
    "**/*.xml": "an export of boxes in XML, without masks: export semantic masks (PNG) or COCO instead",
    "**/*.json": "JSON of a labeling tool, such as labelme or VIA: export one file in COCO's form, as "
    "result.json, or semantic masks (PNG)",
    **dict.fromkeys(
        ("*.zip", "*.tar", "*.tar.gz", "*.tgz", "*.7z", "*.rar"),
        "a folder with an archive: unpack it, and name the folder that comes out",
    ),
}
_DEPTHS = ("", "*/", "*/*/")  # deeper, such files are of something else: of programs in a home folder


def folder_spec(root: Path) -> DatasetSpec:
    """Spec of a folder, from its classes.txt and the folders of its splits.

    Raises:
      UserError: no such files, or a line that cannot be read.
    """
    voc = _is_voc_export(root)
    if not voc and not (root / CLASSES).exists() and (annotated := annotation_files(root)):
        undivided = len({*annotated.values()}) < len(annotated)
        return _folder_spec(
            root, coco_classes(list(annotated.values())), (), list(annotated), undivided
        )
    if not voc and not (root / CLASSES).exists():
        raise UserError(f"{shown(root / CLASSES)}: no such file{_likely(root) or _recognized(root)}")
    listed = read_label_map(root / LABEL_MAP) if voc else read_class_list(root / CLASSES)

    # 255 is void by convention; colors have no such convention.
    ignored = listed.ignored
    if listed.kind != "color" and VOID not in listed.values:
        ignored += (VOID,)

    lists = _voc_lists(root) if voc else {}
    undivided = len({*lists.values()}) < len(lists) if voc else _is_undivided(root)
    splits = sorted(lists) if voc else list(DIVIDED) if undivided else _splits(root)
    return _folder_spec(root, listed.classes, ignored, splits, undivided)


def _folder_spec(
    root: Path,
    classes: tuple[ClassInfo, ...],
    ignored: tuple[int, ...],
    splits: list[str],
    undivided: bool,
) -> DatasetSpec:
    """Spec of a folder with these classes, ignored values and splits.

    undivided: whether `divide` makes the splits.
    """
    # Only the user knows how many examples there are: 0 here. Without a val, test is what is scored.
    named = partial(split_called, splits=splits)
    return DatasetSpec(
        name="folder",
        title=f"the user's own data in {shown(root.name)}{_NOT_SPLIT if undivided else ''}",
        undivided=undivided,
        classes=classes,
        ignored_raw=ignored,
        splits=dict.fromkeys(splits, 0),
        train_split=named("train"),
        eval_split=next((s for s in map(named, ("val", "test")) if s in splits), "val"),
        ignore=", ".join(written(v) for v in ignored) or "none",
        license="the user's own",
    )


def _is_voc_export(root: Path) -> bool:
    """Whether a folder is an export in Pascal VOC's form, with its own names and colors."""
    return (
        not (root / CLASSES).exists() and (root / LABEL_MAP).is_file() and (root / VOC_MASKS).is_dir()
    )


def _voc_lists(root: Path) -> dict[str, Path]:
    """Files that list a VOC-style export's examples, by split.

    Raises:
      UserError: there are none.
    """
    found = {path.stem: path for path in sorted((root / VOC_LISTS).glob("*.txt"))}
    if not found:
        raise UserError(f"{shown(root / VOC_LISTS)}: no lists of examples in it, such as train.txt")

    # CVAT's name for what was not split.
    return dict.fromkeys(DIVIDED, found["default"]) if set(found) == {"default"} else found


def _is_undivided(root: Path) -> bool:
    """Whether images and masks lie directly in their two folders."""
    images, masks = _named(root, IMAGES), _named(root, MASKS)
    if not images or not masks or list_folders(root / images):
        return False
    return bool(_images_in(root / images))


def _images_in(folder: Path) -> list[str]:
    """Names of the image files directly in a folder, sorted."""
    names = sorted(path.name for path in folder.iterdir() if not is_junk(path.name))
    return [name for name in names if name.lower().endswith(IMAGE_ENDINGS)]


def _open_voc_export(spec: DatasetSpec, root: Path, split: str) -> FileSource:
    """Opens the listed examples of a VOC-style export.

    Raises:
      UserError: a listed example without its image or mask, or no example.
    """
    what = f"folder {split}"
    stems = [line for _, line in read_lines(_voc_lists(root)[split])]
    images, masks = (
        pick(_side(root, folder, endings), stems, root / folder, what)
        for folder, endings in ((VOC_IMAGES, IMAGE_ENDINGS), (VOC_MASKS, _MASK_ENDINGS))
    )
    return FileSource(root, pair_up(root, images, masks, what), ColorLabels(spec), strict=True)


def _named(folder: Path, names: tuple[str, ...]) -> str:
    """The subfolder that has the first of the names that is there, in capitals or not; "" for none."""
    there = {name.lower(): name for name in list_folders(folder)}
    return next((there[name] for name in names if name in there), "")


def _splits(root: Path) -> list[str]:
    """Names of the splits: folders in images/, or folders that hold images/.

    Raises:
      UserError: there are none, or the data set is one folder further down.
    """
    if images := _named(root, IMAGES):
        found = list_folders(root / images)
        where = f"{shown(root / images)}: no folders of splits in it"
    else:
        found = [name for name in list_folders(root) if _named(root / name, IMAGES)]
        where = f"{shown(root)}: neither images/SPLIT nor SPLIT/images{_recognized(root)}"
    if not found:
        raise UserError(
            f"{where}; images belong to images/train and images/val, their masks to masks/train and "
            "masks/val"
        )

    # Images beside the folders of splits belong to none of them, and would be left out.
    beside = _images_in(root / images) if images else []
    if beside:
        raise UserError(
            f"{shown(root / images)}: {len(beside)} images beside the folders of splits, such as "
            f"{shown(beside[0])}; move them into one, as images/train"
        )

    # DIR/NAME/images/train has the form of SPLIT/images, but NAME is the data set.
    if not images and len(found) == 1:
        inside = root / found[0] / _named(root / found[0], IMAGES)
        if split_called("train", splits := list_folders(inside)) in splits:
            raise UserError(
                f"{shown(inside)} holds splits: use {shown(root / found[0])} as the data set"
            )
    return found


def _likely(root: Path) -> str:
    """Text that ends a message: a file that was probably meant as the list of classes; "" for none."""
    for place in (root, *(root / name for name in IMAGES)):
        for path in sorted(place.glob("*")) if place.is_dir() else ():
            if re.fullmatch(_NEARLY_CLASSES, path.name, re.IGNORECASE) and path.is_file():
                return f"; {shown(path)} is there: call it {shown(root / CLASSES)}"
    return ""


def _recognized(root: Path) -> str:
    """Text that ends a message: which other layout the folder has, and what to do; "" if unknown."""
    for pattern, told in _OTHERS.items():
        places = [pattern.replace("**/", depth, 1) for depth in _DEPTHS]
        if any(next(root.glob(place), None) is not None for place in dict.fromkeys(places)):
            return f" (this is {told})"
    return ""


class ColorLabels:
    """Reader of RGB masks by the colors of classes.txt."""

    def __init__(self, spec: DatasetSpec):
        pairs = [(v - COLOR, i) for i, c in enumerate(spec.classes) for v in c.raw]
        pairs += [(v - COLOR, IGNORE) for v in spec.ignored_raw]
        self.codes, self.ids = (np.array(side, np.int32) for side in zip(*sorted(pairs), strict=True))

    def __call__(self, path: Path, size: tuple[int, int]) -> np.ndarray:
        """Ids, int32 [h, w].

        Raises:
          LabelValueError: names the file, the color and where it first occurs.
        """
        # Colors as 24-bit codes, looked up by bisection: a table would have 16 million entries.
        code = read_color_label(path).astype(np.int32) @ np.array([65536, 256, 1], np.int32)
        place = np.searchsorted(self.codes, code).clip(max=len(self.codes) - 1)

        unknown = self.codes[place] != code
        if unknown.any():
            y, x = np.argwhere(unknown)[0]
            raise LabelValueError(
                f"{path}: color #{code[y, x]:06x} at row {y}, column {x} is not a class; legal: "
                + ", ".join(f"#{c:06x}" for c in self.codes)
            )
        return self.ids[place]


def open_folder(spec: DatasetSpec, root: Path, split: str) -> FileSource:
    """Opens the images and masks of a split.

    Raises:
      UserError: no such folders, files without their partner, or one image alone to be divided.
    """
    source = _open_listed(spec, root, split)
    if spec.undivided:
        source.pairs = divide(source.pairs, split)
    return source


def _open_listed(spec: DatasetSpec, root: Path, split: str) -> FileSource:
    """Opens all examples of the list or folder that a split is in, paired by their stems at any depth.

    Raises:
      UserError: no such folders, or files without their partner.
    """
    if _is_voc_export(root):
        return _open_voc_export(spec, root, split)
    if not (root / CLASSES).exists():
        return open_coco_json(spec, root, split)

    what = f"folder {split}"
    flat = _named(root, IMAGES), _named(root, MASKS)
    images, masks = flat if spec.undivided else _places(root, split, what)
    sides = _side(root, images, IMAGE_ENDINGS), _side(root, masks, _MASK_ENDINGS)

    # Masks of other formats deserve an error of their own, before every image lacks its mask.
    if sides[0] and not sides[1] and (others := walk_files(root / masks, ("",))):
        endings = sorted({path.suffix.lower() for path in others})
        why = " (JPEG and WebP change values at edges)" if set(endings) & set(_LOSSY) else ""
        raise UserError(
            f"{what}: the files in {shown(root / masks)} end in {', '.join(endings[:5])}{why}; save "
            "the masks as PNG"
        )

    pairs = pair_up(root, sides[0], _by_image(sides[1], sides[0], what), what)

    # All values of a list have one form, so the first shows which. Strict about EXIF, because no
    # convention says how masks of a user's own data were drawn.
    colored = spec.classes[0].raw[0] >= COLOR
    return FileSource(root, pairs, ColorLabels(spec) if colored else IndexLabels(spec), strict=True)


def _places(root: Path, split: str, what: str) -> tuple[str, str]:
    """Folders of the images and masks of a split, relative to root.

    Raises:
      UserError: no folder of masks.
    """
    # Either the two folders hold the splits, or the split holds the two.
    by_split = bool(_named(root, IMAGES))
    above = root if by_split else root / split
    images, masks = _named(above, IMAGES), _named(above, MASKS)
    sides = (
        (f"{images}/{split}", f"{masks}/{split}")
        if by_split
        else (f"{split}/{images}", f"{split}/{masks}")
    )
    if not masks or not (root / sides[1]).is_dir():
        form = f"NAME/{split}" if by_split else f"{split}/NAME"
        raise UserError(
            f"{what}: {shown(root)} has no folder {form} of masks; legal: {', '.join(MASKS)}"
        )
    return sides


def _side(root: Path, folder: str, endings: tuple[str, ...]) -> dict[str, str]:
    """Files of a folder at any depth: {path there without ending: path relative to root}.

    Raises:
      UserError: two files of one stem.
    """
    found: dict[str, str] = {}
    for path in walk_files(root / folder, endings):
        # macOS stores names in another Unicode form (NFD) than people type (NFC).
        stem = unicodedata.normalize("NFC", path.with_suffix("").as_posix())
        if stem in found:
            raise UserError(f"{found[stem]} and {folder}/{path} in {root} are files of one example")
        found[stem] = f"{folder}/{path.as_posix()}"
    return found


def _by_image(masks: dict[str, str], images: dict[str, str], what: str) -> dict[str, str]:
    """Masks by the stem of the image that each belongs to; others keep their own stem.

    A mask belongs to the image of its stem, or to the one that differs from it in marks alone.

    Raises:
      UserError: two masks of one image.
    """
    plain = {_unmarked(stem): stem for stem in images}
    if len(plain) < len(images):  # image_1 and img_1: only whole stems tell them apart
        plain = {}

    found: dict[str, str] = {}
    for stem, path in masks.items():
        whole = _MARKS[0].sub("", stem)
        owners = (stem, whole, plain.get(_unmarked(stem), stem))
        owner = next((name for name in owners if name in images), stem)
        if owner in found:
            raise UserError(f"{what}: {found[owner]} and {path} are masks of one image; keep one")
        found[owner] = path
    return found


def _unmarked(stem: str) -> str:
    """A stem without the marks of masks and images."""
    for mark in _MARKS:
        stem = mark.sub("", stem)
    return stem
