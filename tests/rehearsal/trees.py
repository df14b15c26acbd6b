# SPDX-License-Identifier: Apache-2.0
"""Data for the rehearsals: every data set's official layout, with images of a usable size.

Real images where `../shared/data` beside the checkout has the data set, else made-up ones.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import official_trees
import scipy.io
from PIL import Image

SHARED = Path(__file__).parents[3] / "shared" / "data"
FACTOR = 20  # the made-up trees have 6 x 4 pixels: 120 x 80
_IMAGES = (".png", ".jpg", ".bmp", ".tif")
_VERTEX = re.compile(r'(?<=[XY]=")[\d.]+')


def write_tree(name: str, root: Path) -> Path:
    """Writes a data set's training and evaluation splits, some images each; returns root."""
    real = {"camvid": _camvid, "monuseg": _monuseg, "pascal_voc": _pascal_voc}.get(name)
    if real is None or not real(root):
        official_trees.TREES[name](root)
        _enlarge(root)
    return root


def _enlarge(root: Path) -> None:
    """Repeats every pixel of a made-up tree FACTOR times along both axes."""
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        if path.suffix in _IMAGES:
            with Image.open(path) as small:
                small.resize([FACTOR * side for side in small.size], Image.Resampling.NEAREST).save(
                    path
                )
        elif path.suffix == ".mat":
            label = scipy.io.loadmat(path)["LabelMap"]
            official_trees.mat(path, np.kron(label, np.ones((FACTOR, FACTOR), label.dtype)))
        elif path.suffix == ".xml":
            larger = _VERTEX.sub(lambda x: str(FACTOR * float(x[0])), path.read_text())
            path.write_text(larger)


def _camvid(root: Path) -> bool:
    source = SHARED / "camvid"
    if not source.is_dir():
        return False
    for split in ("train", "val"):
        for image in sorted((source / "images" / split).glob("*.jpg"))[:2]:
            _copy(image, root / "images" / split / image.name)
            label = source / "annotations" / split / f"{image.stem}.png"
            _copy(label, root / "annotations" / split / label.name)
    return True


def _monuseg(root: Path) -> bool:
    """Two training images; one of them stands for a test image, which the challenge keeps apart."""
    source = SHARED / "nuclei_monuseg" / "MoNuSegTrainingData"
    if not source.is_dir():
        return False
    first, second = sorted((source / "Tissue Images").glob("*.tif"))[:2]
    train, test = root / "MoNuSegTrainingData", root / "MoNuSegTestData"
    for image in (first, second):
        _copy(image, train / "Tissue Images" / image.name)
        _copy(source / "Annotations" / f"{image.stem}.xml", train / "Annotations" / f"{image.stem}.xml")
    _copy(second, test / "TCGA-2Z-A9J9-01A-01-TS1.tif")
    _copy(source / "Annotations" / f"{second.stem}.xml", test / "TCGA-2Z-A9J9-01A-01-TS1.xml")
    return True


def _pascal_voc(root: Path) -> bool:
    source = SHARED / "photos_voc" / "VOCdevkit" / "VOC2012"
    if not source.is_dir():
        return False
    voc = root / "VOCdevkit" / "VOC2012"
    lists = "ImageSets/Segmentation"
    for split in ("train", "val"):
        stems = (source / lists / f"{split}.txt").read_text().split()[:2]
        official_trees.lines(voc / lists / f"{split}.txt", *stems)
        for stem in stems:
            for file in (f"JPEGImages/{stem}.jpg", f"SegmentationClass/{stem}.png"):
                _copy(source / file, voc / file)
    return True


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
