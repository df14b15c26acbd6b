# SPDX-License-Identifier: Apache-2.0
"""The three protocols on the 17 IGBP classes of the land cover, with the gate's recall and its time."""

from __future__ import annotations

import dataclasses
from typing import Any

from digseg_jax.config.parse import sampling_settings, with_settings
from digseg_jax.config.sampling import EStep
from digseg_jax.evaluation.evaluator import Evaluator
from digseg_jax.evaluation.examples import eval_examples
from digseg_jax.evaluation.journal import Journal
from digseg_jax.evaluation.suite import scores_of
from digseg_jax.prediction.description import find_export, read_description
from digseg_jax.prediction.pretrained import load_segmenter

DATA = "landcover_igbp"


def run(weights: str, estep: str, images: int, limit: int, cut: float) -> dict[str, Any]:
    """Scores without calibration: a class nobody fitted a bias for is what open vocabulary means."""
    folder = find_export(weights)
    trained = read_description(folder).training_config(folder)
    base = with_settings(trained, sampling_settings(estep))
    evaluation = dataclasses.replace(
        base.eval, num_images=images, gate_limit=limit, gate_cut=cut, inference="whole"
    )
    config = dataclasses.replace(base, eval=evaluation)
    segmenter = load_segmenter(folder, config)
    data = dataclasses.replace(config.data, name=DATA)
    examples = eval_examples(data, "test", images)
    evaluator = Evaluator(segmenter, examples, evaluation, seed=config.seed)
    found, _ = scores_of(evaluator, EStep.parse(estep), Journal(None, DATA, ""), None)
    seconds = {name: 1.0 / row["images_per_second"] for name, row in found["protocols"].items()}
    return {
        "data": DATA,
        "split": examples.split,
        "estep": estep,
        "gate": {"limit": limit, "cut": cut, "scorer": "one step, linear probe"},
        "seconds_per_image": seconds,
        "gated_share_of_time": seconds["gated"] / seconds["exhaustive"],
        **found,
    }
