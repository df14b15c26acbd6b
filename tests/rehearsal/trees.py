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

from digseg_jax.data.datasets.domains import DOMAINS
from digseg_jax.data.datasets.spec import shipped_list

SHARED = Path(__file__).parents[3] / "shared" / "data"
FACTOR = 20  # the made-up trees have 6 x 4 pixels: 120 x 80
_IMAGES = (".png", ".jpg", ".bmp", ".tif")
_VERTEX = re.compile(r'(?<=[XY]=")[\d.]+')


def write_tree(name: str, root: Path) -> Path:
    """Writes a data set's training and evaluation splits, some images each; returns root."""
    real = {"camvid": _camvid, "monuseg": _monuseg, "pascal_voc": _pascal_voc}.get(name)
    if real is None or not real(root):
        stems = {"stems": ("1", shipped_list("deepglobe_test")[0])} if name == "deepglobe" else {}
        official_trees.TREES[name](root, **stems)
        _enlarge(root)
    if name in ("deepglobe", "monuseg"):
        _complete(name, root)
    return root


def write_domains(root: Path) -> Path:
    """Writes a tree for every domain of the generalist, those of one layout alike; returns root."""
    layouts = {"pascal_voc_21": "pascal_voc"}
    for domain in DOMAINS:
        if domain.reader != "landcover":  # which comes from packages
            write_tree(layouts.get(domain.reader, domain.reader), root / domain.name)
    return root


def _complete(name: str, root: Path) -> None:
    """Gives every example of the splits that are lists a file: a link to one that is there."""
    for split in ("train", "test"):
        if name == "deepglobe" and split == "train":
            continue  # it is what the list leaves
        stems = shipped_list(f"{name}_{split}")
        files = [p for p in sorted(root.rglob("*")) if p.is_file() and "__MACOSX" not in p.parts]
        there = {p.name for p in files}
        stem = next(s for s in stems if any(n.startswith(s) for n in there))
        for file in [p for p in files if p.name.startswith(stem)]:
            for other in stems:
                link = file.with_name(other + file.name.removeprefix(stem))
                if link.name not in there:
                    link.symlink_to(file)


def _enlarge(root: Path) -> None:
    """Repeats every pixel of a made-up tree FACTOR times along both axes."""
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        if path.suffix in _IMAGES:
            with Image.open(path) as small:
                size = [FACTOR * side for side in small.size]
                small.resize(size, Image.Resampling.NEAREST).save(path)
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
    """The real training images; one stands for a test image, which the challenge keeps apart."""
    source = SHARED / "nuclei_monuseg" / "MoNuSegTrainingData"
    if not source.is_dir():
        return False
    first, stem = sorted((source / "Tissue Images").glob("*.tif"))[0], shipped_list("monuseg_test")[0]
    for file in (p for p in source.rglob("*") if p.suffix in (".tif", ".xml")):
        link = root / source.name / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file)
    _copy(first, root / "MoNuSegTestData" / f"{stem}.tif")
    _copy(source / "Annotations" / f"{first.stem}.xml", root / "MoNuSegTestData" / f"{stem}.xml")
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
