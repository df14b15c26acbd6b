# SPDX-License-Identifier: Apache-2.0
"""What land-cover classes are called: training prompts, names held out of training, captions."""

from __future__ import annotations

import itertools

import numpy as np

from digseg_jax.data.datasets.landcover import GROUPS, IGBP

# the first prompt of a class is its trained name; all of them are drawn evenly in training
GROUP_PROMPTS = {
    "water": ("water", "sea", "lake", "open water", "sea water", "body of water"),
    "forest": (
        "forest",
        "trees",
        "rainforest",
        "tree cover",
        "taiga",
        "jungle",
        "the woods",
        "wooded area",
        "forested area",
    ),
    "shrub and grass": (
        "shrub and grass",
        "grassland",
        "shrubland",
        "savanna",
        "steppe",
        "prairie",
        "tundra",
        "rangeland",
    ),
    "cropland": (
        "cropland",
        "crops",
        "agriculture",
        "arable land",
        "cultivated fields",
        "plantations",
        "agricultural land",
        "cultivated land",
        "crop fields",
    ),
    "wetland": ("wetland", "swamp", "marsh", "bog", "flooded land"),
    "urban": (
        "urban",
        "urban area",
        "town",
        "built-up land",
        "buildings",
        "metropolis",
        "urban district",
        "downtown",
        "suburb",
    ),
    "snow and ice": ("snow and ice", "snow", "ice", "glacier", "ice cap", "snow cover"),
    "barren": (
        "barren",
        "barren land",
        "bare soil",
        "sand",
        "sand dunes",
        "bare rock",
        "arid wasteland",
    ),
}
IGBP_PROMPTS = {name: (name,) if name in GROUP_PROMPTS else (name, f"area of {name}") for name in IGBP}
PROMPTS = {"groups": GROUP_PROMPTS, "igbp": IGBP_PROMPTS}

# never shown in training; each is asked in place of the group's trained name
HELD_OUT = {
    "ocean": "water",
    "woodland": "forest",
    "desert": "barren",
    "ice sheet": "snow and ice",
    "farmland": "cropland",
    "city": "urban",
}

CAPTION_CLASSES = 3  # a caption names at most so many classes


def training_prompts(label_sets: tuple[str, ...]) -> tuple[list[str], dict[str, list[list[int]]]]:
    """All prompts of a training run, and for each label set the prompt ids of each class."""
    prompts: list[str] = []
    ids: dict[str, list[list[int]]] = {}
    for label_set in label_sets:
        ids[label_set] = []
        for names in PROMPTS[label_set].values():
            ids[label_set].append(list(range(len(prompts), len(prompts) + len(names))))
            prompts.extend(names)
    return prompts, ids


def captions() -> list[str]:
    """Every caption of the prior's training: one to three groups in their usual order."""
    subsets = itertools.chain.from_iterable(
        itertools.combinations(GROUPS, n) for n in range(1, CAPTION_CLASSES + 1)
    )
    return [f"satellite image of {', '.join(names)}" for names in subsets]


def caption_id(label: np.ndarray) -> int:
    """The caption of a crop of group labels: its (at most three) largest groups above 8 %."""
    share = np.bincount(label.ravel(), minlength=len(GROUPS)) / label.size
    largest = np.argsort(-share, kind="stable")[:CAPTION_CLASSES]
    chosen = tuple(sorted(int(c) for c in largest if share[c] > 0.08 or c == largest[0]))
    return _CAPTION_IDS[chosen]


_CAPTION_IDS = {
    subset: i
    for i, subset in enumerate(
        itertools.chain.from_iterable(
            itertools.combinations(range(len(GROUPS)), n) for n in range(1, CAPTION_CLASSES + 1)
        )
    )
}
