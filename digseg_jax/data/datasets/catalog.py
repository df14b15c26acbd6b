# SPDX-License-Identifier: Apache-2.0
"""Specs of the data sets of the paper, and of this project's own.

Counts are the official releases' numbers of labeled images. `absent` follows the code that made the
published tables of a data set: detectron2's rule in the open-vocabulary ones, mmsegmentation's in the
supervised ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from digseg_jax.data.datasets.landcover_prompts import PROMPTS
from digseg_jax.data.datasets.spec import ClassInfo, DatasetSpec, load_classes

_RESEARCH = "non-commercial research; registration with the authors"
# VOC 2010's own lists, and the shorter ones of PASCAL in Detail, which most published numbers use
_CONTEXT_SPLITS = {"train": 4_998, "val": 5_105, "train_4996": 4_996, "val_5104": 5_104}
_FLICKR = "images under Flickr terms; no registration"


def _ade20k() -> DatasetSpec:
    """ADE20K's 150 classes of the scene-parsing challenge."""
    return DatasetSpec(
        name="ade20k",
        title="ADE20K-150 (MIT SceneParsing, ADEChallengeData2016)",
        inference="whole",
        splits={"train": 20_210, "val": 2_000},
        ignore="0 (other objects) and 255",
        license="annotations BSD-3-Clause, images for research; no registration",
        **load_classes("ade20k"),
    )


def _ade20k_847() -> DatasetSpec:
    """ADE20K's 847 classes, as open-vocabulary papers evaluate them."""
    return DatasetSpec(
        name="ade20k_847",
        title="ADE20K-847 (full ADE20K, release 2021_17_01, at a short side of 512 or less)",
        inference="whole",
        splits={"train": 25_574, "val": 2_000},
        ignore="every object that is not one of the 847; 255 is the class 'pier'",
        license="terms of ade20k.csail.mit.edu; registration",
        absent="detectron2",
        **load_classes("ade20k_847"),
    )


def _pascal_context_59() -> DatasetSpec:
    """PASCAL-Context's 59 most frequent classes."""
    return DatasetSpec(
        name="pascal_context_59",
        title="PASCAL-Context, 59 classes, background ignored",
        inference="whole",
        splits=_CONTEXT_SPLITS,
        extra_splits=("train_4996", "val_5104"),
        ignore="every raw label that is not one of the 59, 0 among them",
        license=_FLICKR,
        absent="detectron2",
        **load_classes("pascal_context_59"),
    )


def _pascal_context_459() -> DatasetSpec:
    """PASCAL-Context's full list of 459 classes."""
    return DatasetSpec(
        name="pascal_context_459",
        title="PASCAL-Context, all 459 labels ('unknown' is one of them)",
        inference="whole",
        splits=_CONTEXT_SPLITS,
        extra_splits=("train_4996", "val_5104"),
        ignore="0; 255 is the class 'monkey'",
        license=_FLICKR,
        absent="detectron2",
        **load_classes("pascal_context_459"),
    )


def _pascal_voc(name: str, title: str, ignore: str, absent: str) -> DatasetSpec:
    """PASCAL VOC's classes, with SBD's additional training labels."""
    return DatasetSpec(
        name=name,
        title=f"PASCAL VOC 2012, {title}",
        inference="whole",
        splits={"train": 1_464, "val": 1_449, "trainaug": 10_582},
        extra_splits=("trainaug",),
        ignore=ignore,
        license=_FLICKR,
        absent=absent,
        **load_classes(name),
    )


def _coco_stuff() -> DatasetSpec:
    """COCO-Stuff's 171 classes of things and stuff."""
    return DatasetSpec(
        name="coco_stuff",
        title="COCO-Stuff-171 (164k, 2017)",
        inference="whole",
        splits={"train": 118_287, "val": 5_000},
        ignore="255 and the eleven values that no class has",
        license="annotations CC BY 4.0, images under Flickr terms; no registration",
        template="A photo of a {} in the scene",  # CAT-Seg's, the tables' common training
        **load_classes("coco_stuff"),
    )


def _cityscapes() -> DatasetSpec:
    """Cityscapes' 19 classes that count in its benchmark."""
    return DatasetSpec(
        name="cityscapes",
        title="Cityscapes, 19 classes, fine annotations (the test labels are not public)",
        splits={"train": 2_975, "val": 500},
        ignore="every labelId without a trainId",
        license=_RESEARCH,
        **load_classes("cityscapes"),
    )


def _bdd100k() -> DatasetSpec:
    """BDD100K's 19 classes, the same as Cityscapes'."""
    return DatasetSpec(
        name="bdd100k",
        title="BDD100K semantic segmentation, 19 classes (the test labels are not public)",
        splits={"train": 7_000, "val": 1_000},
        ignore="255",
        license="UC Berkeley terms: education, research, not for profit; registration",
        absent="detectron2",  # bdd100k's own evaluator: classes that occur
        **load_classes("bdd100k"),
    )


def _deepglobe() -> DatasetSpec:
    """DeepGlobe's roads on satellite images."""
    return DatasetSpec(
        name="deepglobe",
        title="DeepGlobe road extraction 2018: the research split of the 6,226 labeled images",
        splits={"train": 4_696, "test": 1_530, "all": 6_226},
        extra_splits=("all",),
        eval_split="test",
        ignore="none; 255 is road",
        license=_RESEARCH,
        metric="foreground",
        **load_classes("deepglobe"),
    )


def _refuge2() -> DatasetSpec:
    """REFUGE2's optic disc and cup on fundus images; the disc contains the cup."""
    return DatasetSpec(
        name="refuge2",
        title="REFUGE2 optic disc and cup, the 400/400/400 release",
        inference="whole",
        splits={"train": 400, "val": 400, "test": 400},
        eval_split="test",
        ignore="none; 255 is background",
        license=_RESEARCH,
        metric="region_dice",
        **load_classes("refuge2"),
    )


def _monuseg() -> DatasetSpec:
    """MoNuSeg's nuclei on histology images."""
    return DatasetSpec(
        name="monuseg",
        title="MoNuSeg 2018 nuclei: the challenge's 30 training images, or all 37",
        splits={"train": 30, "train_37": 37, "test": 14},
        extra_splits=("train_37",),
        eval_split="test",
        ignore="none",
        license="CC BY-NC-SA 4.0",
        metric="foreground",
        **load_classes("monuseg"),
    )


def _phenobench() -> DatasetSpec:
    """PhenoBench's crop and weed on images of fields from above."""
    return DatasetSpec(
        name="phenobench",
        title="PhenoBench crop and weed (the test labels are not public)",
        splits={"train": 1_407, "val": 772},
        ignore="none; partial plants count as their kind",
        license="CC BY-SA 4.0",
        **load_classes("phenobench"),
    )


def _camvid() -> DatasetSpec:
    """CamVid's 11 classes of driving scenes."""
    return DatasetSpec(
        name="camvid",
        title="CamVid, 11 classes, 480x360",
        splits={"train": 367, "val": 101, "test": 233},
        extra_splits=("test",),
        ignore="11 (void)",
        license="CC BY-NC 4.0: research only",
        **load_classes("camvid"),
    )


def _landcover(label_set: str, name: str) -> DatasetSpec:
    """The bundled satellite mosaic with the classes of one label set, "groups" or "igbp"."""
    prompts = PROMPTS[label_set]
    return DatasetSpec(
        name=name,
        title=f"NASA Blue Marble with MODIS land cover of 2019, {len(prompts)} classes",
        # The first text of a class is its name, the others are synonyms.
        classes=tuple(ClassInfo(n, texts[1:], (i,)) for i, (n, texts) in enumerate(prompts.items())),
        splits={"train": 198, "val": 55, "test": 81},
        eval_split="test",
        caption="satellite image of {}",
        from_package=True,
        ignore="none",
        license="public domain (NASA); the packages' own licenses for their files",
    )


# Functions, so that a class list is only read when its data set is asked for.
SPECS: dict[str, Callable[[], DatasetSpec]] = {
    "ade20k": _ade20k,
    "ade20k_847": _ade20k_847,
    "bdd100k": _bdd100k,
    "camvid": _camvid,
    "cityscapes": _cityscapes,
    "coco_stuff": _coco_stuff,
    "deepglobe": _deepglobe,
    "landcover": functools.partial(_landcover, "groups", "landcover"),
    "landcover_igbp": functools.partial(_landcover, "igbp", "landcover_igbp"),
    "monuseg": _monuseg,
    "pascal_context_59": _pascal_context_59,
    "pascal_context_459": _pascal_context_459,
    # open-vocabulary tables leave the background out, supervised ones count it
    "pascal_voc": functools.partial(
        _pascal_voc,
        "pascal_voc",
        "20 classes, background ignored",
        "0 (background) and 255 (void)",
        "detectron2",
    ),
    "pascal_voc_21": functools.partial(
        _pascal_voc, "pascal_voc_21", "background and 20 classes", "255 (void)", "mmseg"
    ),
    "phenobench": _phenobench,
    "refuge2": _refuge2,
}
