# SPDX-License-Identifier: Apache-2.0
"""Miniature downloads in the official layouts and encodings, for the readers' tests.

`TREES[name](root)` writes the splits "train" and one for evaluation; images are 6 x 4 (width x height)
unless the encoding needs another size.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

H, W = 4, 6


def image(path: Path, height: int = H, width: int = W, mode: str = "RGB", **options) -> Path:
    """An image whose pixels differ."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 9 % 256, columns * 7 % 256, (rows + columns) % 256], axis=-1)
    Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(path, **options)
    return path


def save(path: Path, label, dtype=np.uint8) -> Path:
    """A one-channel label file; its format follows the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(label, dtype)).save(path)
    return path


def grid(*values: int, height: int = H, width: int = W) -> np.ndarray:
    """The values one after another, row by row; the last one fills the rest."""
    flat = np.full(height * width, values[-1])
    flat[: len(values)] = values
    return flat.reshape(height, width)


def voc_palette() -> list[int]:
    """VOC's color map: the bits of the index, dealt to the three channels from the top."""
    colors = np.zeros((256, 3), int)
    for index in range(256):
        for bit in range(8):
            for channel in range(3):
                colors[index, channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
    return colors.ravel().tolist()


def save_palette(path: Path, label) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = Image.fromarray(np.asarray(label, np.uint8))
    file.putpalette(voc_palette())
    assert file.mode == "P"
    file.save(path)
    return path


def lines(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(names) + "\n", encoding="utf-8")
    return path


def mat(path: Path, label, dtype=np.uint16, compress: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, {"LabelMap": np.asarray(label, dtype)}, do_compression=compress)
    return path


def seg_png(path: Path, objects) -> Path:
    """Full ADE20K's coding: R = 10 * (object // 256), G = object % 256, B = instance."""
    objects = np.asarray(objects)
    path.parent.mkdir(parents=True, exist_ok=True)
    instance = np.arange(objects.size).reshape(objects.shape) % 7
    pixels = np.stack([10 * (objects // 256), objects % 256, instance], axis=-1)
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def rle_counts(mask: np.ndarray) -> list[int]:
    """Run lengths down the columns, starting with a run of zeros: written apart from the reader."""
    counts, value, run = [], 0, 0
    for pixel in np.asarray(mask).T.ravel():
        if pixel != value:
            counts.append(run)
            value, run = pixel, 0
        run += 1
    return [*counts, run]


def rle_text(counts: Sequence[int]) -> str:
    """COCO's packed form of run lengths."""
    text = ""
    for i, count in enumerate(counts):
        value = count - counts[i - 2] if i > 2 else count
        while True:
            low, value = value & 31, value >> 5
            done = value == (-1 if low & 16 else 0)
            text += chr(48 + low + (0 if done else 32))
            if done:
                break
    return text


def ade20k(root: Path) -> None:
    base = root / "ADEChallengeData2016"
    for folder, stem in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        image(base / "images" / folder / f"{stem}.jpg")
        save(base / "annotations" / folder / f"{stem}.png", grid(0, 1, 150, 255, 90, 7))


def ade20k_847(root: Path) -> None:
    base = root / "ADE20K_2021_17_01" / "images" / "ADE"
    objects = {2978: 0, 312: 1}
    for folder, stem in (("training", "ADE_train_00016869"), ("validation", "ADE_val_00000042")):
        scene = base / folder / "urban" / "street"
        image(scene / f"{stem}.jpg")
        seg_png(scene / f"{stem}_seg.png", grid(0, *objects, 3687, 2978))
        seg_png(scene / f"{stem}_parts_1.png", grid(5))
        seg_png(scene / stem / f"instance_000_{stem}.png", grid(1))
        (scene / f"{stem}.json").write_bytes(b'{"name": "caf\xe9"}')  # not UTF-8, and never read


def bdd100k(root: Path) -> None:
    for split, stem in (("train", "0004a4c0-d4dff0ad"), ("val", "7d06fefd-f7be05a6")):
        image(root / "bdd100k/images/10k" / split / f"{stem}.jpg")
        save(root / "bdd100k/labels/sem_seg/masks" / split / f"{stem}.png", grid(0, 18, 255, 7))
        image(root / "bdd100k/labels/sem_seg/colormaps" / split / f"{stem}.png")


def camvid(root: Path) -> None:
    for split in ("train", "val"):
        image(root / "images" / split / "0001TP_006690.jpg")
        save(root / "annotations" / split / "0001TP_006690.png", grid(0, 10, 11, 3))


def cityscapes(root: Path) -> None:
    for split, city in (("train", "aachen"), ("val", "frankfurt")):
        stem = f"{city}_000000_000019"
        image(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png")
        fine = root / "gtFine" / split / city
        save(fine / f"{stem}_gtFine_labelIds.png", grid(*range(34), height=6, width=6)[:H])
        save(fine / f"{stem}_gtFine_instanceIds.png", grid(26001), np.uint16)
        save(fine / f"{stem}_gtFine_labelTrainIds.png", grid(0))
        image(fine / f"{stem}_gtFine_color.png", mode="RGBA")
        (fine / f"{stem}_gtFine_polygons.json").write_text('{"objects": []}')


def coco_stuff(root: Path) -> None:
    for split, stem in (("train2017", "000000000009"), ("val2017", "000000000139")):
        image(root / "coco_stuff164k/images" / split / f"{stem}.jpg")
        folder = root / "coco_stuff164k/annotations" / split
        save(folder / f"{stem}.png", grid(0, 10, 12, 89, 91, 181, 255, 11, 25, 28, 29, 44, 65, 67,
                                          68, 70, 82, 90))  # fmt: skip
        save(folder / f"{stem}_labelTrainIds.png", grid(3))


def deepglobe(root: Path, stems: Sequence[str] = ("1", "388122")) -> None:
    for stem in stems:  # the second one is on the list of test images
        image(root / "train" / f"{stem}_sat.jpg")
        save(root / "train" / f"{stem}_mask.png", grid(0, 127, 128, 255, 3))


def folder(root: Path) -> None:
    lines(root / "classes.txt", "background", "road, street")
    for split in ("train", "val"):
        image(root / "images" / split / "a.jpg")
        save(root / "masks" / split / "a.png", grid(0, 1, 255, 1))


def aperio(path: Path, *layers: Sequence[Sequence[tuple[float, float]]]) -> Path:
    """ImageScope XML: a layer is an Annotation, a region its list of (x, y)."""
    text = '<?xml version="1.0"?>\n<Annotations MicronsPerPixel="0.252">'
    for layer in layers:
        text += '<Annotation Id="1"><Regions><RegionAttributeHeaders/>'
        for region in layer:
            vertices = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in region)
            text += f'<Region Id="1"><Vertices>{vertices}</Vertices></Region>'
        text += "</Regions></Annotation>"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "</Annotations>", encoding="utf-8")
    return path


def monuseg(root: Path) -> None:
    triangle = [(0.5, 0.5), (3.5, 0.5), (0.5, 3.5)]
    train = root / "MoNuSeg 2018 Training Data" / "MoNuSeg 2018 Training Data"
    image(train / "Tissue Images" / "TCGA-18-5592-01Z-00-DX1.tif")
    aperio(train / "Annotations" / "TCGA-18-5592-01Z-00-DX1.xml", [triangle])
    test = root / "MoNuSegTestData"
    image(test / "TCGA-2Z-A9J9-01A-01-TS1.tif")
    aperio(test / "TCGA-2Z-A9J9-01A-01-TS1.xml", [triangle])
    aperio(root / "__MACOSX/MoNuSegTestData" / "._TCGA-2Z-A9J9-01A-01-TS1.xml", [triangle])


def pascal_context(root: Path) -> None:
    voc = root / "VOCdevkit/VOC2010"
    for stem, split in (("2008_000002", "train"), ("2008_000003", "val")):
        image(voc / "JPEGImages" / f"{stem}.jpg")
        lines(voc / "ImageSets/Main" / f"{split}.txt", stem)
        mat(voc / "trainval" / f"{stem}.mat", grid(0, 2, 256, 431, 459, 397))


def pascal_voc(root: Path) -> None:
    voc = root / "VOCdevkit/VOC2012"
    for stem, split in (("2007_000032", "train"), ("2007_000033", "val")):
        image(voc / "JPEGImages" / f"{stem}.jpg")
        lines(voc / "ImageSets/Segmentation" / f"{split}.txt", stem)
        save_palette(voc / "SegmentationClass" / f"{stem}.png", grid(0, 1, 20, 255, 15))


def phenobench(root: Path) -> None:
    for split in ("train", "val"):
        name = "05-15_00028_P0030852.png"
        image(root / "PhenoBench" / split / "images" / name)
        save(root / "PhenoBench" / split / "semantics" / name, grid(0, 1, 2, 3, 4, 0), np.uint16)
        save(root / "PhenoBench" / split / "leaf_instances" / name, grid(9), np.uint16)


def refuge2(root: Path) -> None:
    rim = grid(255, 128, 0, 128, 255)
    image(root / "Training400/Glaucoma/g0001.jpg")
    image(root / "Training400/Non-Glaucoma/n0001.jpg")
    for kind, stem in (("Glaucoma", "g0001"), ("Non-Glaucoma", "n0001")):
        save(root / "Annotation-Training400/Disc_Cup_Masks" / kind / f"{stem}.bmp", rim)
    image(root / "REFUGE-Validation400/REFUGE-Validation400/V0001.jpg")
    save(root / "REFUGE-Validation400-GT/Disc_Cup_Masks/V0001.bmp", rim)
    image(root / "Test400/T0001.jpg")
    save(root / "REFUGE-Test-GT/Disc_Cup_Masks/G/T0001.bmp", rim)
    image(root / "REFUGE-Validation400/Illustration/V0001.jpg")
    save(root / "__MACOSX/REFUGE-Test-GT/Disc_Cup_Masks/G/._T0001.bmp", rim)


TREES = {
    "ade20k": ade20k,
    "ade20k_847": ade20k_847,
    "bdd100k": bdd100k,
    "camvid": camvid,
    "cityscapes": cityscapes,
    "coco_stuff": coco_stuff,
    "deepglobe": deepglobe,
    "folder": folder,
    "monuseg": monuseg,
    "pascal_context_59": pascal_context,
    "pascal_context_459": pascal_context,
    "pascal_voc": pascal_voc,
    "pascal_voc_21": pascal_voc,
    "phenobench": phenobench,
    "refuge2": refuge2,
}


# the image of the evaluated split, where it is the only one of its name
EVALUATED = {
    "ade20k": "ADE_val_00000001",
    "ade20k_847": "ADE_val_00000042",
    "cityscapes": "frankfurt_000000_000019",
    "pascal_context_459": "2008_000003",
    "pascal_context_59": "2008_000003",
    "pascal_voc": "2007_000033",
}


def repeated(root: Path, name: str, count: int) -> None:
    """A data set's tree with `count` evaluated images: copies whose numbers are counted up."""
    TREES[name](root)
    stem = EVALUATED[name]
    head, digits = stem.rstrip("0123456789"), stem[len(stem.rstrip("0123456789")) :]
    stems = [f"{head}{int(digits) + i:0{len(digits)}}" for i in range(count)]
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        if path.name.startswith(stem):
            for other in stems[1:]:
                shutil.copyfile(path, path.with_name(path.name.replace(stem, other)))
        elif path.suffix == ".txt" and stem in path.read_text().split():
            lines(path, *path.read_text().split(), *stems[1:])


def detail_json(path: Path, images: Sequence[tuple[str, str]], masks: Sequence[tuple]) -> Path:
    """trainval_merged.json: images as (stem, phase), masks as (stem, category, counts, packed)."""
    ids = {stem: int(stem.replace("_", "")) for stem, _ in images}
    merged = {
        "info": {"note": "images"},
        "images": [
            {"image_id": ids[s], "file_name": f"{s}.jpg", "phase": p, "height": H, "width": W}
            for s, p in images
        ],
        "annos_segmentation": [
            {"image_id": ids[s], "category_id": c, "segmentation": {"size": [H, W], "counts": r}}
            for s, c, r in masks
        ],
        "annos_occlusion": [],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(merged), encoding="utf-8")
    return path
