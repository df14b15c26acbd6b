# SPDX-License-Identifier: Apache-2.0
"""Reads PASCAL VOC-20, and PASCAL-Context with 59 or 459 labels, from .mat files or from JSON."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from digseg_jax.data.datasets.decode import LabelTable
from digseg_jax.data.datasets.pairs import FileSource, Pair, find_root, list_files, pair_up, pick
from digseg_jax.data.datasets.readers.detail_json import DetailJson, Masks, paint
from digseg_jax.data.datasets.readers.index import IndexLabels
from digseg_jax.data.datasets.readers.matfile import label_map, read_mat
from digseg_jax.data.datasets.spec import DatasetSpec
from digseg_jax.errors import UserError
from digseg_jax.io.files import UnreadableError, read_lines
from digseg_jax.log import log

_JSON = "trainval_merged.json"  # the labels as PASCAL in Detail distributes them
_OWN_LISTS = {"train": "train_4996", "val": "val_5104"}  # split -> the name of the JSON file's own list


class ContextLabels:
    """Reader of a .mat file's LabelMap (ids of the 459 labels) through the spec's table."""

    def __init__(self, spec: DatasetSpec):
        self.table = LabelTable.of(spec)

    def __call__(self, path: Path, size: tuple[int, int]) -> np.ndarray:
        """Ids, int32 [h, w]; `size` is not needed, the file has its own."""
        return self.table(label_map(path, read_mat(path, "LabelMap")), path)


class PaintedSource(FileSource):
    """Source whose labels are painted from the masks of one JSON file.

    masks: for each pair the masks of its image.
    """

    def __init__(self, root: Path, pairs: list[Pair], masks: list[Masks], table: LabelTable):
        super().__init__(root, pairs, read_label=None)
        self.masks, self.table = masks, table

    def label(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """int32 [h, w] of an example whose image has `size` (height, width)."""
        path = self.files(index)["label"]
        where = f"{path}: image {self.pairs[index].name}"
        return self.table(paint(self.masks[index], size, where), path)


def open_pascal_context(spec: DatasetSpec, root: Path, split: str) -> FileSource:
    """Opens VOC2010/JPEGImages with trainval/ID.mat or trainval_merged.json, in VOC2010 or beside it.

    train and val are VOC's own lists (ImageSets/Main); train_4996 and val_5104 the shorter ones of
    PASCAL in Detail, from the JSON file's phases, or for val from pascalcontext_val.txt. The .mat files
    are read where both are there. The JSON file alone lacks three images of VOC's lists: its own lists
    are train and val then.

    Raises:
      UserError: neither form of the labels, or listed files that are missing.
    """
    what = f"{spec.name} {split}"
    voc = find_root(root, "JPEGImages", ("VOCdevkit/VOC2010", "VOC2010"), what)

    # Labels come in two forms. The JSON file is large, so it is parsed only if something needs it.
    mats = next((p for p in (voc / "trainval", root / "trainval") if p.is_dir()), None)
    merged = next((p for p in (voc / _JSON, root / _JSON) if p.is_file()), None)
    if mats is None and merged is None:
        raise UserError(f"{what}: neither a folder trainval nor {_JSON} in {voc} or {root}")
    detail = DetailJson(merged) if merged and (mats is None or split == "train_4996") else None

    # Listed images only: JPEGImages also holds the images of VOC's other tasks.
    stems = _context_stems(voc, split, detail, merged, what)
    images = _jpegs(voc, stems, what)

    # One .mat file per image ...
    if mats is not None:
        found = {s: str(mats / name) for s, name in list_files(mats, (".mat",)).items()}
        labels = pick(found, stems, mats, what)
        source = FileSource(voc, pair_up(voc, images, labels, what), ContextLabels(spec))
        source.own_list = True
        return source

    # ... or one JSON file for all. An image without a mask in it has an empty label.
    assert merged is not None and detail is not None
    known = pick(dict.fromkeys(detail.phases, str(merged)), stems, merged, what)
    pairs = pair_up(voc, images, known, what)
    masks = [detail.masks.get(p.name, []) for p in pairs]
    source = PaintedSource(voc, pairs, masks, LabelTable.of(spec))
    source.own_list = True
    if stems == _of_phase(detail, split):
        source.listed_as = _OWN_LISTS.get(split, "")
    return source


def _listed(path: Path, split: str, detail: DetailJson, what: str) -> list[str]:
    """The names in VOC's list if the JSON file has all of them; else its own list, which is logged."""
    stems = read_list(path) if path.is_file() else []
    missing = [s for s in stems if s not in detail.phases]
    if stems and not missing:
        return stems

    own = _of_phase(detail, split)
    reason = f"{_JSON} lacks {len(missing)} of its {len(stems)} images" if stems else "is not there"
    log.info("%s: %s: %s; reading the JSON file's own list of %d images", what, path, reason, len(own))
    return own


def _of_phase(detail: DetailJson, split: str) -> list[str]:
    """The JSON file's own list of a split, whose name begins with that of a phase: train or val."""
    phase = split.partition("_")[0]
    return [stem for stem, found in detail.phases.items() if found == phase]


def _context_stems(
    voc: Path, split: str, detail: DetailJson | None, merged: Path | None, what: str
) -> list[str]:
    """Names of the images of a split, from the file that defines it.

    detail: the JSON file, if the labels come from it.

    Raises:
      UserError: no such file.
    """
    if split in ("train", "val"):
        path = voc / "ImageSets" / "Main" / f"{split}.txt"
        return read_list(path) if detail is None else _listed(path, split, detail, what)

    listed = voc / "pascalcontext_val.txt"
    if split == "val_5104" and listed.is_file():
        return read_list(listed)
    if merged is None:
        raise UserError(f"{what}: the list is in {_JSON}, which is not in {voc} or beside it")
    return _of_phase(detail or DetailJson(merged), split)


def open_pascal_voc(spec: DatasetSpec, root: Path, split: str) -> FileSource:
    """Opens VOC2012/JPEGImages, SegmentationClass and ImageSets/Segmentation.

    trainaug adds the labels of SBD: from its release (benchmark_RELEASE/dataset/cls/*.mat), or from the
    third-party folder SegmentationClassAug. VOC's own labels win, and its val images stay out.

    Raises:
      UserError: missing folders or lists, or listed files that are missing.
    """
    what = f"{spec.name} {split}"
    voc = find_root(root, "SegmentationClass", ("VOCdevkit/VOC2012", "VOC2012"), what)
    lists = voc / "ImageSets" / "Segmentation"
    own = {
        s: f"SegmentationClass/{name}"
        for s, name in list_files(voc / "SegmentationClass", (".png",)).items()
    }

    # SBD also labels images that VOC labels, and some of them are in VOC's val list.
    if split != "trainaug":
        stems = read_list(lists / f"{split}.txt")
        labels = pick(own, stems, voc / "SegmentationClass", what)
    else:
        labels = pick(own, read_list(lists / "train.txt"), voc / "SegmentationClass", what)
        val = set(read_list(lists / "val.txt"))
        more = {s: path for s, path in _sbd(root, voc, what).items() if s not in val}
        labels = more | labels

    images = _jpegs(voc, list(labels), what)
    source = FileSource(voc, pair_up(voc, images, labels, what), VocLabels(spec))
    source.own_list = split != "trainaug"
    return source


def _sbd(root: Path, voc: Path, what: str) -> dict[str, str]:
    """SBD's labels by image name: its own release if it is there, else SegmentationClassAug.

    Raises:
      UserError: neither is there.
    """
    places = (root, voc, voc.parent, voc.parent.parent)

    # The archive unpacks beside VOCdevkit, inside it, or wherever the user put it.
    for place in (p / "benchmark_RELEASE" / "dataset" for p in places):
        if (place / "cls").is_dir():
            stems = [*read_list(place / "train.txt"), *read_list(place / "val.txt")]
            found = {s: str(place / "cls" / n) for s, n in list_files(place / "cls", (".mat",)).items()}
            return pick(found, dict.fromkeys(stems), place / "cls", what)
    aug = voc / "SegmentationClassAug"
    if aug.is_dir():
        return {s: f"{aug.name}/{name}" for s, name in list_files(aug, (".png",)).items()}
    raise UserError(f"{what}: neither benchmark_RELEASE/dataset/cls near {voc} nor {aug}")


class VocLabels:
    """Reader of a palette or index PNG, or of SBD's GTcls.Segmentation in a .mat file."""

    def __init__(self, spec: DatasetSpec):
        self.index = IndexLabels(spec)

    def __call__(self, path: Path, size: tuple[int, int]) -> np.ndarray:
        """Ids, int32 [h, w].

        Raises:
          UnreadableError, LabelValueError: with the file's path.
        """
        if path.suffix != ".mat":
            return self.index(path, size)

        try:
            value = read_mat(path, "GTcls")["Segmentation"].reshape(-1)[0]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise UnreadableError(f"{path}: GTcls holds no Segmentation: {error}") from error
        return self.index.table(label_map(path, value), path)


def read_list(path: Path) -> list[str]:
    """First word of each line of an image-set file.

    Raises:
      UnreadableError: not UTF-8, or words that are not image names.
    """
    words = [text.split()[0] for _, text in read_lines(path)]

    # Names become paths: none may lead out of the data set's folder.
    if any("/" in w or "\\" in w or w.startswith(".") for w in words):
        raise UnreadableError(f"{path}: lists something other than image names")
    return words


def _jpegs(voc: Path, stems: list[str], what: str) -> dict[str, str]:
    """Images of the listed stems, relative to VOC's folder."""
    folder = voc / "JPEGImages"
    found = {s: f"JPEGImages/{name}" for s, name in list_files(folder, (".jpg",)).items()}
    return pick(found, stems, folder, what)
