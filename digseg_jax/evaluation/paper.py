# SPDX-License-Identifier: Apache-2.0
"""Figures that the paper states (project page of arXiv 2604.24575), to print beside measured ones.

Percent, as printed there. BDD100K, Cityscapes driving, REFUGE2 and PhenoBench are shown as images only,
so they have no figures. The page leaves several points of its evaluation open: prompts, class gating,
and the input size except in table 2. A figure here is a landmark, not a target that was reproduced.
Rows of other methods are left out: one of them differs from what its authors report themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the paper's own model.

    table: number of the table on the page. weights: text encoder or input size, which distinguishes the
    rows of a table. figures: percent by metric. searched: whether the threshold was searched for (the
    page does not say on which images) instead of 0.5.
    """

    table: str
    weights: str
    figures: Mapping[str, str]
    searched: bool = False


# (suite, data set) -> rows in the order of the page; table 1 is trained on COCO-Stuff
ROWS: dict[tuple[str, str], tuple[Row, ...]] = {
    ("open_vocab", "ade20k_847"): (
        Row("1a", "L/14", {"miou": "19.9"}),
        Row("1b", "B/16", {"miou": "17.5"}),
    ),
    ("open_vocab", "pascal_context_459"): (
        Row("1a", "L/14", {"miou": "29.2"}),
        Row("1b", "B/16", {"miou": "23.1"}),
    ),
    ("open_vocab", "ade20k"): (
        Row("1a", "L/14", {"miou": "43.2"}),
        Row("1b", "B/16", {"miou": "37.2"}),
    ),
    ("open_vocab", "pascal_context_59"): (
        Row("1a", "L/14", {"miou": "68.4"}),
        Row("1b", "B/16", {"miou": "62.7"}),
    ),
    ("open_vocab", "cityscapes"): (
        Row("1a", "L/14", {"miou": "38.5"}),
        Row("1b", "B/16", {"miou": "36.5"}),
    ),
    ("semantic", "coco_stuff"): (Row("2", "512x512", {"miou": "50.8"}),),
    ("semantic", "ade20k"): (Row("2", "512x512", {"miou": "58.6"}),),
    ("deepglobe", "deepglobe"): (
        Row("3", "", {"iou": "65.78", "precision": "79.93", "recall": "78.92", "f1": "78.79"}),
    ),
    ("medical", "monuseg"): (
        Row("5", "CLIP", {"f1": "78.27", "iou": "64.29"}),
        Row("5", "CLIP", {"f1": "79.84", "iou": "66.44"}, searched=True),
        # the page does not say whether this threshold was searched for
        Row("5", "BiomedCLIP", {"f1": "84.56", "iou": "73.25"}),
    ),
}

# table 4: E-Step -> (COCO-Stuff mIoU, ADE20K mIoU, frames per second on hardware that is not named)
ESTEP: dict[str, tuple[str, str, str]] = {
    "1x1": ("48.2", "56.8", "11.27"),
    "1x2": ("48.5", "57.1", "10.61"),
    "4x2": ("50.5", "58.5", "5.82"),
    "8x2": ("50.8", "58.6", "3.15"),
    "20x50:leading": ("50.9", "58.8", "0.12"),
}


def figure(suite: str, dataset: str, metric: str, *, searched: bool = False) -> str:
    """The paper's figures of a metric in percent, such as "19.9 (L/14), 17.5 (B/16)", or a dash."""
    stated = [
        row.figures[metric] + (f" ({row.weights})" if row.weights else "")
        for row in ROWS.get((suite, dataset), ())
        if metric in row.figures and row.searched == searched
    ]
    return ", ".join(stated) or "–"
