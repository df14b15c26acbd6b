# SPDX-License-Identifier: Apache-2.0
"""What a generalist paints for names of things that an image cannot show: all names, in every domain.

The suite asks each domain for one name of every other group. Here a view from the middle of a few
images, no larger than the network sees at once, is asked for every class of every other domain.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from digseg_jax.config.experiment import load_config
from digseg_jax.config.sampling import EStep
from digseg_jax.data.datasets.domains import DOMAINS
from digseg_jax.data.sources import parts_of, spec_of
from digseg_jax.data.vocabulary import bank_prompts, foreign_rows
from digseg_jax.errors import UserError
from digseg_jax.evaluation.counts import DEFAULT_THRESHOLD
from digseg_jax.evaluation.domains import domain_examples
from digseg_jax.io.progress import Progress
from digseg_jax.prediction.pretrained import load_segmenter
from digseg_jax.prediction.request import Request
from tests.bench.domain_scores import chosen_domains

ESTEP = EStep(1, 1)
VIEW = 128  # side of the view at the domain's scale, pixels
WORST = 5  # names of a row


def run(weights: str, root: str, split: str, images: int, only: Sequence[str] = ()) -> dict[str, Any]:
    """Mean area (0..1) of the masks of foreign names, and the names that cover most.

    Args:
      weights: as load_segmenter takes them.
      root: folder of all domains.
      split: val, or train to choose what a training should see more of.
      images: of each domain, evenly spread.
      only: names of domains; empty: all. Names of all domains are asked for anyway.

    A domain whose data is missing is a row that says so, and lends no names.

    Raises:
      UserError: no such domain.
    """
    chosen = chosen_domains(only)
    data = load_config("generalist", **{"data.root": root, "data.templates": ("{}",)}).data
    parts, missing = {}, {}
    for domain, part in zip(DOMAINS, parts_of(data), strict=True):
        try:
            spec_of(part)
            parts[domain.name] = part
        except UserError as error:
            missing[domain.name] = {"missing": str(error)}
    data = dataclasses.replace(data, mixture=tuple(parts.values()))
    prompts, rows = bank_prompts(data), dict(zip(parts, foreign_rows(data), strict=True))

    segmenter = load_segmenter(weights)
    table: dict[str, Any] = {}
    for domain in chosen:
        if domain.name in missing:
            table[domain.name] = missing[domain.name]
            continue

        # The first name of each class; a name that two domains share is asked for once.
        others = rows[domain.name]
        names = tuple(dict.fromkeys(prompts[row[0]] for classes in others for row in classes))
        if not names:
            continue
        examples = domain_examples(domain, root, split, images)

        seen = segmenter.seen_at(VIEW)
        templates = seen.asks_in(examples.template)
        areas = np.zeros(len(names))
        progress = Progress(len(examples), label=f"foreign names {domain.name}", unit="images")
        started = time.monotonic()
        for i in range(len(examples)):
            view = middle(examples[i]["image"], domain.short_side)
            (answer,) = seen.segment([Request(view, i, names, None, templates)], ESTEP)
            areas += [float((answer.alone(q) > DEFAULT_THRESHOLD).mean()) for q in range(len(names))]
            progress.update(i + 1, (i + 1) / (time.monotonic() - started))
        progress.close()

        areas /= len(examples)
        worst = np.argsort(-areas, kind="stable")[:WORST]
        table[domain.name] = {
            "images": len(examples),
            "names": len(names),
            "mean": float(areas.mean()),
            "above_half_a_percent": int((areas > 0.005).sum()),
            "worst": {names[k]: float(areas[k]) for k in worst},
        }
    means = [row["mean"] for row in table.values() if "mean" in row]
    mean = float(np.mean(means)) if means else None
    return {"weights": weights, "estep": str(ESTEP), "split": split, "domains": table, "mean": mean}


def middle(image: np.ndarray, short_side: int) -> np.ndarray:
    """The square in the middle, [s, s, 3], that is `VIEW` pixels wide at the domain's scale."""
    height, width = image.shape[:2]
    side = min(height, width)
    side = min(side, round(side * VIEW / short_side))
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]
