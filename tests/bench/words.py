# SPDX-License-Identifier: Apache-2.0
"""How a generalist takes words: trained names, synonyms that no training used, and wrong names.

Of each domain's val, every class below is asked three times: by its trained name, by a synonym, and by
the name of something else (another class of the list; for a class alone, a name of another domain).
All three masks are compared with the truth of the class.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from digseg_jax.config.sampling import EStep
from digseg_jax.config.schema import PartConfig
from digseg_jax.data.datasets.domains import Domain, wrong_names
from digseg_jax.data.datasets.landcover_prompts import HELD_OUT
from digseg_jax.data.sources import spec_of
from digseg_jax.errors import UserError
from digseg_jax.evaluation.counts import DEFAULT_THRESHOLD
from digseg_jax.evaluation.domains import domain_examples
from digseg_jax.evaluation.examples import EvalExamples
from digseg_jax.io.progress import Progress
from digseg_jax.prediction.pretrained import load_segmenter
from digseg_jax.prediction.request import Request
from digseg_jax.prediction.segmenter import Segmenter
from tests.bench.domain_scores import chosen_domains

ESTEP = EStep(1, 1)
# domain -> {trained name: synonym that no training uses}
SYNONYMS = {
    "photos_coco128": {
        "person": "human being", "car": "automobile", "dog": "puppy", "cat": "kitten",
        "pizza": "pizza pie", "bed": "bunk", "airplane": "jet aircraft", "train": "locomotive",
    },
    "photos_voc": {
        "person": "human being", "dog": "puppy", "cat": "kitten", "horse": "pony", "cow": "cattle",
        "sheep": "lamb", "car": "automobile", "sofa": "settee", "boat": "ship",
    },
    "fashion_ccp": {
        "hair": "hairdo", "dress": "gown", "pants": "slacks", "shoes": "footwear", "skin": "bare skin",
        "jacket": "outerwear jacket", "shirt": "button-up",
    },
    "camvid": {
        "sky": "the heavens", "building": "house", "road": "roadway", "pavement": "footpath",
        "tree": "foliage", "car": "automobile", "pole": "post", "pedestrian": "people walking",
    },
    "nuclei_dsb2018": {"nucleus": "nuclei of the cells"},
    "nuclei_monuseg": {"nucleus": "nuclei of the cells"},
    "cells_wbc": {"cytoplasm": "cytosol", "nucleus": "leukocyte nucleus"},
    "retina_drishti": {"optic disc rim": "rim of the disc", "optic cup": "cup of the disc"},
    "retina_disc": {"optic disc": "optic papilla"},
    "retina_vessels": {"blood vessel": "retinal vasculature"},
    "roads_epfl": {"road": "roadway"},
    "crops_cwfid": {"crop": "cultivated plant", "weed": "unwanted plants", "soil": "bare earth"},
    "crops_carrots": {"crop": "cultivated plant", "weed": "unwanted plants", "soil": "bare earth"},
    "pavement_cracks": {"pavement": "tarmac", "crack": "fissure"},
    "landcover": {group: name for name, group in HELD_OUT.items()},
}  # fmt: skip
# Rarer ones, written after the training of the shipped weights, whose words they could not know.
RARER = {
    "camvid": {
        "sky": "firmament", "building": "edifice", "road": "thoroughfare", "pavement": "promenade",
        "tree": "woody plant", "car": "motor vehicle",
    },
    "nuclei_dsb2018": {"nucleus": "karyon"},
    "nuclei_monuseg": {"nucleus": "karyon"},
    "cells_wbc": {"cytoplasm": "protoplasm", "nucleus": "karyon"},
    "retina_drishti": {
        "optic disc rim": "edge of the optic disc", "optic cup": "excavation of the optic disc",
    },
    "retina_disc": {"optic disc": "head of the optic nerve"},
    "retina_vessels": {"blood vessel": "capillary"},
    "roads_epfl": {"road": "motorway"},
    "crops_cwfid": {"crop": "farm plant", "weed": "nuisance plant", "soil": "loam"},
    "pavement_cracks": {"pavement": "paving", "crack": "rupture"},
}  # fmt: skip
Synonyms = Mapping[str, Mapping[str, str]]


def run(
    weights: str, root: str, images: int, only: Sequence[str] = (), synonyms: Synonyms = SYNONYMS
) -> dict[str, Any]:
    """IoU by domain and class of masks asked by the name, by a synonym, and by a wrong name.

    Args:
      weights: as load_segmenter takes them.
      root: folder of all domains.
      images: of each domain's val, evenly spread; 0: all.
      only: names of domains; empty: all.
      synonyms: `SYNONYMS` or `RARER`; domains without any are left out.

    Raises:
      UserError: a synonym that is a name in some domain's training.
    """
    domains = [domain for domain in chosen_domains(only) if domain.name in synonyms]
    opened: dict[str, EvalExamples] = {}
    rows: dict[str, Any] = {}
    for domain in domains:
        try:
            opened[domain.name] = domain_examples(domain, root, "val", images)
        except UserError as error:
            rows[domain.name] = {"missing": str(error)}
    _check_unseen(domains, root, synonyms)

    segmenter = load_segmenter(weights)
    for domain in domains:
        if domain.name in opened:
            seen = segmenter.seen_at(domain.short_side)
            rows[domain.name] = _one(seen, domain, opened[domain.name], synonyms[domain.name])

    # What synonyms keep, and what wrong names get, of the right names' mean IoU over the domains.
    measured = [row["mean"] for row in rows.values() if "mean" in row]
    means = {k: float(np.mean([row[k] for row in measured])) for k in ("name", "synonym", "wrong")}
    right = max(means["name"], 1e-9)
    kept = {"synonyms_keep": means["synonym"] / right, "wrong_get": means["wrong"] / right}
    return {"weights": weights, "estep": str(ESTEP), "domains": rows, "mean": means, **kept}


def _check_unseen(domains: Sequence[Domain], root: str, synonyms: Synonyms) -> None:
    """Raises UserError for a synonym that a domain with readable data trains on."""
    trained = set()
    for domain in domains:
        part = domain.part()
        folder = part["folder"] and f"{root}/{part['folder']}"
        try:
            classes = spec_of(PartConfig(part["name"], folder, synonyms=part["synonyms"])).classes
        except UserError:
            continue
        trained |= {text.lower() for c in classes for text in (c.name, *c.synonyms)}
    for name, words in synonyms.items():
        if known := trained & {word.lower() for word in words.values()}:
            raise UserError(f"{name}: {', '.join(sorted(known))} are names of the training")


def _one(
    segmenter: Segmenter, domain: Domain, examples: EvalExamples, synonyms: Mapping[str, str]
) -> dict[str, Any]:
    """The row of one domain."""
    words = {n: s for n, s in synonyms.items() if n in examples.classes}
    names = list(words)
    wrong = [*names[1:], names[0]] if len(names) > 1 else [wrong_names(domain)[0]]
    queries = tuple(dict.fromkeys([*names, *words.values(), *wrong]))
    templates = segmenter.asks_in(examples.template)

    # Pooled intersections and unions of every class under its three names.
    hits, unions = np.zeros((2, 3, len(names)), np.int64)
    progress = Progress(len(examples), label=f"words {domain.name}", unit="images")
    started = time.monotonic()
    for i in range(len(examples)):
        example = examples[i]
        request = Request(example["image"], i, queries, None, templates)
        (answer,) = segmenter.segment([request], ESTEP)
        valid = example["label"] >= 0
        masks = {q: (answer.alone(k) > DEFAULT_THRESHOLD) & valid for k, q in enumerate(queries)}
        for k, name in enumerate(names):
            true = np.isin(example["label"], examples.covers[examples.classes.index(name)])
            for way, asked in enumerate((name, words[name], wrong[k])):
                hits[way, k] += (masks[asked] & true).sum()
                unions[way, k] += (masks[asked] | true).sum()
        progress.update(i + 1, (i + 1) / (time.monotonic() - started))
    progress.close()

    iou = hits / np.maximum(unions, 1)
    ways = ("name", "synonym", "wrong")
    classes = {
        name: {"synonym": words[name], "wrong": wrong[k]}
        | {f"{way}_iou": float(iou[w, k]) for w, way in enumerate(ways)}
        for k, name in enumerate(names)
    }
    mean = {way: float(iou[w].mean()) for w, way in enumerate(ways)}
    return {"images": len(examples), "classes": classes, "mean": mean}
