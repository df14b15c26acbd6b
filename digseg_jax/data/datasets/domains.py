# SPDX-License-Identifier: Apache-2.0
"""The domains of the generalist: what a mixture and a suite know of each data set beside its files.

One table serves the training (configs/generalist.py) and the evaluation (--suite=domains): where a set
lies below config.data.root, at which scale its images are seen, which of its classes nobody asks for,
what its labels leave open, and which of its training images are kept aside.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from digseg_jax.data.datasets.more_words import MORE_WORDS

REST = ("background",)  # a class that means "none of the others": the word says nothing of an image

# One tile of each of six organs, as nothing official is set aside.
_MONUSEG_HELD_OUT = "TCGA-(A7-A13F|49-4488|B0-5711|CH-5767|DK-A2I6|NH-A8F7)"


@dataclasses.dataclass(frozen=True)
class Domain:
    """A data set of the generalist.

    Attributes:
      name: its folder below config.data.root, and its row in the suite's table.
      reader: what config.data.name calls data of its layout.
      group: the kind of things that its classes name; `may_show` refers to it.
      short_side: pixels of an image's short side at scale 1; 0: not known.
      scale_min, scale_max: range of the random scale in training.
      quarter_turns: whether its images have no upright.
      jitter: strength of color augmentation; 0 where the color is the class.
      weight: share of the training examples, relative to the other domains.
      may_show: groups and single names of other domains whose things its images may show without a
        label: for them they are unknown, for all others they are negatives.
      held_out: regex on names of training images that are kept out of the training, whole scenes for
        an honest validation; empty: none.
      val: the split that the suite scores as val.
      terms: of its images and labels, in words.
      shareable: whether these terms allow derived works, such as trained weights, to be passed on.
    """

    name: str
    reader: str = "folder"
    group: str = ""
    short_side: int = 128
    scale_min: float = 0.75
    scale_max: float = 1.33
    quarter_turns: bool = False
    jitter: float = 0.5
    weight: float = 1.0
    may_show: tuple[str, ...] = ()
    held_out: str = ""
    val: str = "val"
    terms: str = ""
    shareable: bool = False

    def part(self) -> dict[str, Any]:
        """The domain as an item of config.data.mixture; its root lies below config.data.root."""
        shared = {f.name for f in dataclasses.fields(self)} & set(_PART_KEYS)
        values = {key: getattr(self, key) for key in sorted(shared - {"name"})}
        folder = "" if self.reader == "landcover" else self.name
        own = {"name": self.reader, "folder": folder, "unasked": REST}
        return values | own | {"synonyms": MORE_WORDS.get(self.name, ())}


# Keys of `config.schema.PartConfig` that a domain has under the same name.
_PART_KEYS = (
    "name", "group", "short_side", "scale_min", "scale_max", "quarter_turns", "jitter", "weight",
    "may_show", "held_out",
)  # fmt: skip

# A photograph may show anything that is seen with the naked eye.
_ANYTHING = ("thing", "street", "clothing", "field", "pavement", "aerial", "land")

DOMAINS = (
    Domain(
        "photos_coco128",
        terms="labels CC BY 4.0, images under the licenses of Flickr's users",
        group="thing",
        scale_min=0.8,
        scale_max=1.8,
        may_show=_ANYTHING,
        shareable=True,
        weight=0.5,
    ),
    Domain(
        "photos_voc",
        terms="images under Flickr's terms, labels for research",
        reader="pascal_voc_21",
        group="thing",
        scale_min=0.8,
        scale_max=1.8,
        weight=1.0,
        may_show=_ANYTHING,
    ),
    Domain(
        "fashion_ccp",
        terms="photographs of people, for research",
        group="clothing",
        scale_max=1.8,
        may_show=_ANYTHING,
        weight=0.3,
    ),
    Domain(
        "camvid",
        terms="CC BY-NC 4.0",
        reader="camvid",
        group="street",
        scale_min=0.8,
        scale_max=1.6,
        weight=5.0,
        may_show=(
            "thing",
            "clothing",
            "pavement",
            "urban",
            "urban area",
            "town",
            "buildings",
            "road network",
        ),
        held_out="^0006R0",  # one of the three videos
        shareable=True,
    ),
    Domain(
        "nuclei_dsb2018",
        terms="CC0 1.0",
        group="cell",
        short_side=256,
        scale_min=0.7,
        quarter_turns=True,
        may_show=("cell",),
        shareable=True,
        weight=0.7,
    ),
    Domain(
        "nuclei_monuseg",
        terms="CC BY-NC-SA 4.0",
        reader="monuseg",
        group="cell",
        short_side=500,
        quarter_turns=True,
        may_show=("cell", "blood vessel", "vessels"),
        held_out=_MONUSEG_HELD_OUT,
        val="held_out",
        shareable=True,
    ),
    Domain(
        "cells_wbc",
        terms="research",
        group="cell",
        short_side=168,
        weight=2.0,
        quarter_turns=True,
    ),
    Domain(
        "retina_drishti",
        terms="research, after registration with the authors",
        group="retina",
        short_side=400,
        scale_max=1.33,
        scale_min=0.6,
        weight=2.0,
        may_show=("retina",),
    ),
    Domain(
        "retina_disc",
        terms="none stated; research",
        group="retina",
        short_side=256,
        scale_max=1.33,
        scale_min=0.6,
        weight=3.5,
        may_show=("retina",),
    ),
    Domain(
        "retina_vessels",
        terms="none stated; research",
        group="retina",
        short_side=600,
        quarter_turns=True,
        may_show=("retina",),
    ),
    Domain(
        "roads_epfl",
        terms="none stated; imagery of Google Maps",
        group="aerial",
        short_side=240,
        weight=3.0,
        quarter_turns=True,
        may_show=("street", "thing", "land", "pavement"),
    ),
    Domain(
        "crops_cwfid",
        terms="non-commercial research",
        group="field",
        short_side=280,
        weight=3.0,
        quarter_turns=True,
        may_show=("land", "tree", "vegetation", "potted plant", "carrot"),
    ),
    Domain(
        "crops_carrots",
        terms="non-commercial applications",
        group="field",
        short_side=240,
        quarter_turns=True,
        may_show=("land", "tree", "vegetation", "potted plant", "carrot"),
        weight=1.0,
    ),
    Domain(
        "pavement_cracks",
        terms="non-commercial research",
        group="pavement",
        short_side=400,
        quarter_turns=True,
        weight=1.5,
        may_show=("street", "aerial"),
    ),
    Domain(
        "landcover",
        terms="public domain",
        reader="landcover",
        group="land",
        scale_min=1.0,
        scale_max=1.0,
        quarter_turns=True,
        jitter=0.0,
        weight=3.0,
        may_show=("street", "aerial", "field", "pavement"),
        shareable=True,
    ),
)


# For each group, a name that no image of another group can show, except as `may_show` says.
WRONG_NAMES = {
    "thing": "giraffe",
    "street": "bicyclist",
    "clothing": "skirt",
    "cell": "nucleus",
    "retina": "optic disc",
    "aerial": "road network",
    "field": "weed",
    "pavement": "crack",
    "land": "wetland",
}


def wrong_names(domain: Domain) -> tuple[str, ...]:
    """Names of other domains that a domain's images cannot show; () for a domain without a group."""
    shown = {domain.group, *domain.may_show}
    wrong = {word for group, word in WRONG_NAMES.items() if not {group, word} & shown}
    return tuple(w for w in WRONG_NAMES.values() if domain.group and w in wrong)


def shareable_domains() -> tuple[Domain, ...]:
    """The domains whose terms allow weights trained on them to be passed on."""
    return tuple(domain for domain in DOMAINS if domain.shareable)
