# SPDX-License-Identifier: Apache-2.0
"""What an autoencoder loses of each domain's images and masks, at the scale at which they are seen."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from digseg_jax.config.schema import Config
from digseg_jax.data.crops import CropRules, random_view
from digseg_jax.data.datasets.domains import DOMAINS, Domain
from digseg_jax.errors import UserError
from digseg_jax.evaluation.domains import domain_examples
from digseg_jax.segmentation.binary import encode_binary
from digseg_jax.training.tasks.base import to_unit
from digseg_jax.training.tasks.parts import load_vae

MASK_PIXELS = 64  # least area of a mask that counts: in a smaller one a few pixels decide
BATCH = 4  # crops and masks that the autoencoder takes at a time


def run(vae: str, root: str, images: int, size: int) -> dict[str, Any]:
    """Mean error of images (0..255) and mean IoU of single masks, by domain; missing ones are told.

    Args:
      vae: as config.model.vae takes it.
      root: folder of all domains.
      images: of each domain's val, evenly spread; one crop of each.
      size: side of the crops, pixels.
    """
    config = Config()
    model, params = load_vae(dataclasses.replace(config.model, vae=vae), config.compute)
    there_and_back = jax.jit(lambda batch: model.decode(params, model.encode(params, batch)))
    rows = {}
    for domain in DOMAINS:
        try:
            rows[domain.name] = _one(there_and_back, domain, root, images, size)
        except UserError as error:
            rows[domain.name] = {"missing": str(error)}
    return {"vae": vae, "images": images, "crop": size, "domains": rows}


def _one(
    there_and_back: Any, domain: Domain, root: str, images: int, size: int
) -> dict[str, float | int]:
    """The row of one domain."""
    examples = domain_examples(domain, root, "val", images)
    scale = domain.short_side / size
    rules = CropRules(size, scale, scale, class_share_cap=1.0, flip=0.0, jitter=0.0)
    rng = np.random.default_rng(0)
    errors, overlaps = [], []
    for i in range(len(examples)):
        example = examples[i]
        image, label = random_view(example["image"], example["label"], rules, rng)

        # The image and the masks of all classes that it shows: a crop has room for few of them. Empty
        # masks (of a class that is none) fill the last batch, so that one program is compiled.
        areas = {c: int((label == c).sum()) for c in examples.asked}
        shown = [c for c, area in areas.items() if area >= MASK_PIXELS]
        asked = np.array([shown + [-2] * (-(1 + len(shown)) % BATCH)], int)
        everything = np.concatenate([to_unit(image)[None], encode_binary(label[None], asked)[0]])
        batches = np.split(everything, len(everything) // BATCH)
        decoded = np.concatenate([there_and_back(batch) for batch in batches])

        errors.append(127.5 * np.abs(np.clip(decoded[0], -1, 1) - everything[0]).mean())
        for mask, c in zip(decoded[1:], shown, strict=False):
            found, true = mask.mean(axis=-1) > 0, label == c
            overlaps.append((found & true).sum() / (found | true).sum())
    mean = float(np.mean(overlaps)) if overlaps else 0.0
    return {"image_error": float(np.mean(errors)), "mask_iou": mean, "masks": len(overlaps)}
