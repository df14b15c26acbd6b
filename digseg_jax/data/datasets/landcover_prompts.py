# SPDX-License-Identifier: Apache-2.0
"""Names of land-cover classes: training prompts, and names held out of training."""

from __future__ import annotations

from digseg_jax.data.datasets.landcover import IGBP

# The first prompt of a class is its name; training draws all of them evenly.
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
IGBP_PROMPTS: dict[str, tuple[str, ...]] = {
    name: (name,) if name in GROUP_PROMPTS else (name, f"area of {name}") for name in IGBP
}
PROMPTS: dict[str, dict[str, tuple[str, ...]]] = {"groups": GROUP_PROMPTS, "igbp": IGBP_PROMPTS}

# Names that training never shows; each is asked in place of the group's own name.
HELD_OUT = {
    "ocean": "water",
    "woodland": "forest",
    "desert": "barren",
    "ice sheet": "snow and ice",
    "farmland": "cropland",
    "city": "urban",
}
