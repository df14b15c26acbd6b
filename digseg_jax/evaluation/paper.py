# SPDX-License-Identifier: Apache-2.0
"""Figures that the paper states (project page of arXiv 2604.24575), to print beside measured ones.

Percent, as printed there. BDD100K, Cityscapes driving, REFUGE2 and PhenoBench are shown as images
only, so they have no figures. How the paper evaluates is unknown in several points (prompts, input
size, class gating); a figure here is a landmark, not a target that was reproduced.
"""

from __future__ import annotations

# suite -> data set -> metric -> figure; ViT-L/14 first, then another text encoder if the page has one
FIGURES: dict[str, dict[str, dict[str, str]]] = {
    "open_vocab": {
        "ade20k_847": {"miou": "19.9 (L/14), 17.5 (B/16)"},
        "pascal_context_459": {"miou": "29.2 (L/14), 23.1 (B/16)"},
        "ade20k": {"miou": "43.2 (L/14), 37.2 (B/16)"},
        "pascal_context_59": {"miou": "68.4 (L/14), 62.7 (B/16)"},
        "cityscapes": {"miou": "38.5 (L/14), 36.5 (B/16)"},
    },
    "semantic": {"coco_stuff": {"miou": "50.8"}, "ade20k": {"miou": "58.6"}},
    "deepglobe": {
        "deepglobe": {"iou": "65.78", "precision": "79.93", "recall": "78.92", "f1": "78.79"}
    },
    "medical": {
        "monuseg": {
            "f1": "78.27 (CLIP), 84.56 (BiomedCLIP)",
            "iou": "64.29 (CLIP), 73.25 (BiomedCLIP)",
        },
    },
}
# MoNuSeg at a threshold found on other images, instead of 0.5
MONUSEG_SEARCHED = {"f1": "79.84", "iou": "66.44"}

# E-Step -> (COCO-Stuff mIoU, ADE20K mIoU, frames per second on hardware that the page does not name)
ESTEP: dict[str, tuple[str, str, str]] = {
    "1x1": ("48.2", "56.8", "11.27"),
    "1x2": ("48.5", "57.1", "10.61"),
    "4x2": ("50.5", "58.5", "5.82"),
    "8x2": ("50.8", "58.6", "3.15"),
    "20x50:leading": ("50.9", "58.8", "0.12"),
}


def figure(suite: str, dataset: str, metric: str) -> str:
    """The paper's figure of a metric in percent, or a dash where it states none."""
    return FIGURES.get(suite, {}).get(dataset, {}).get(metric, "–")
