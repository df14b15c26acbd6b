# SPDX-License-Identifier: Apache-2.0
"""The reference for each domain of the generalist: boosted trees on pixels, fitted on its train split.

They see images at the generalist's scale, and are scored as the suite scores: at the labels' own size,
mean IoU of the classes that are asked for and occur.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier

from digseg_jax.config.schema import PartConfig
from digseg_jax.data.datasets.domains import Domain
from digseg_jax.data.sources import spec_of
from digseg_jax.errors import UserError
from digseg_jax.evaluation.domains import domain_examples
from digseg_jax.log import log
from tests.bench.domain_scores import chosen_domains, mean_row, scaled, score
from tests.bench.trees import features

TRAIN_PIXELS = 300_000
ROUNDS = 150  # boosting rounds, each of a tree per class
MANY = 20  # from so many classes on there are fewer rounds, to end in minutes
FEW_ROUNDS = 40


def run(root: str, split: str, images: int, only: Sequence[str] = (), seed: int = 0) -> dict[str, Any]:
    """Mean IoU of trees on every domain.

    Args:
      root: folder of all domains.
      split: as --config.eval.split takes it in the suite.
      images: of the scored split, evenly spread; 0: all.
      only: names of domains; empty: all.
      seed: of the choice of pixels and of the trees.
    """
    rows: dict[str, Any] = {}
    for domain in chosen_domains(only):
        try:
            rows[domain.name] = _one(domain, root, split, images, seed)
        except UserError as error:
            rows[domain.name] = {"missing": str(error)}
        log.info("%s: %s", domain.name, rows[domain.name])
    facts = {"split": split, "pixels": TRAIN_PIXELS, "seed": seed}
    return facts | {"domains": rows, "mean": mean_row(rows)}


def _one(domain: Domain, root: str, split: str, images: int, seed: int) -> dict[str, Any]:
    """The row of one domain."""
    started = time.monotonic()
    scored = domain_examples(domain, root, split, images)
    values = domain.part()
    facts = spec_of(PartConfig(values["name"], values["folder"] and f"{root}/{values['folder']}"))
    training = domain_examples(domain, root, facts.train_split)

    # The same number of pixels of every training image, ignored ones left out.
    rng = np.random.default_rng(seed)
    share = -(-TRAIN_PIXELS // len(training))
    xs, ys = [], []
    for i in range(len(training)):
        image, label = scaled(training[i]["image"], training[i]["label"], domain.short_side)
        table = features(image)
        x, y = table.reshape(-1, table.shape[-1]), label.ravel()
        chosen = rng.permutation(np.flatnonzero(y >= 0))[:share]
        xs.append(x[chosen])
        ys.append(y[chosen])
    x, y = np.concatenate(xs), np.concatenate(ys)

    rounds = ROUNDS if len(np.unique(y)) < MANY else FEW_ROUNDS
    model = HistGradientBoostingClassifier(max_iter=rounds, early_stopping=False, random_state=seed)
    model.fit(x, y)

    def predict(image: np.ndarray) -> np.ndarray:
        table = features(image)
        return model.predict(table.reshape(-1, table.shape[-1])).reshape(table.shape[:2])

    row = score(scored, domain.short_side, predict)
    return row | {"rounds": rounds, "seconds": round(time.monotonic() - started, 1)}
