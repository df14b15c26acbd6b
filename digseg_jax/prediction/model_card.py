# SPDX-License-Identifier: Apache-2.0
"""Model card (README.md) of an export: use, training data, scores, limits and license."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from digseg_jax import assets
from digseg_jax.data.datasets.domains import DOMAINS
from digseg_jax.prediction.description import Description
from digseg_jax.segmentation.codecs import CODECS
from digseg_jax.viz.templates import render
from digseg_jax.weights import catalog

OWN_LICENSE = "apache-2.0"  # license of the weights that ship with the package
OWN_DATA = {"landcover", "landcover_igbp"}  # public domain, from packages
MANY = 3  # from more data sets on, the title says how many
RANDOM = "random weights"  # `Description.started_from` of a run without a checkpoint


def model_card(description: Description, results: dict[str, Any] | None = None, asset: str = "") -> str:
    """Builds the card of an export, with the front matter that the hub reads.

    results: content of results.json, from an evaluation of these weights, or of suite_domains.json;
      None: not evaluated.
    asset: "assets:NAME" of weights that ship with the package and have a LICENSE of their own; "" for a
      whole pipeline in a folder or on the hub.
    """
    # A closed codec must be asked for all of its classes; else two make a short example: those that
    # the domains show it to know best.
    codec = CODECS[description.recorded_config().model.codec]
    trained = description.datasets
    several = f"{len(trained)} data sets" if len(trained) > MANY else ", ".join(trained)
    title = f"Segmentation by words, trained on {several}"
    known = _best_known(results, description.classes) or description.classes
    words = list(description.classes if codec.closed else known[:2])

    license_name, license_said = _license(description, asset)
    return render(
        "prediction/model_card.md.j2",
        front_matter=_front_matter(description, license_name, title, results).to_yaml(),
        title=title,
        asset=asset,
        words=json.dumps(words, ensure_ascii=False),
        training=description,
        started_from=_public(description.started_from),
        autoencoder=_public(description.vae.reference),
        text_encoder=_public(description.text.reference),
        scores=_scores(results),
        crop=description.recorded_config().data.image_size,
        closed=codec.closed,
        license=license_said,
    )


def _front_matter(
    description: Description, license_name: str, title: str, results: dict[str, Any] | None
) -> ModelCardData:
    """The hub's metadata of a card; scores go into its `model-index`."""
    # The hub asks for a name with license "other".
    more: dict[str, Any] = {}
    if license_name == "other":
        more["license_name"] = "terms-of-its-data-and-of-the-weights-it-started-from"

    # Links to the checkpoint that the training started from, if the hub has it.
    known = catalog.find(description.started_from)
    if known:
        more["base_model"] = known.hub_id

    # The hub takes scores only together with a model name.
    if results:
        more |= {"model_name": title, "eval_results": _eval_results(results)}
    return ModelCardData(
        license=license_name,
        library_name="diffusers",
        pipeline_tag="image-segmentation",
        tags=["digseg", "open-vocabulary", "diffusers", "jax"],
        **more,
    )


def _eval_results(results: dict[str, Any]) -> list[EvalResult]:
    """Mean IoU and pixel accuracy (0..1) for the hub; a score that is null or nan is left out."""
    # Of domains, each has one score; a missing one has none.
    if "suite" in results:
        scored = [(row, {"mean_iou": row["asked_miou"]}) for row in _measured(results)]
    else:
        values = {"mean_iou": results["miou"], "accuracy": results["accuracy"]}
        scored = [(results, values)]

    # `value == value` below is False for nan, which JSON on the hub cannot hold.
    return [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=row["dataset"],
            dataset_name=row["dataset"],
            dataset_split=row["split"],
            metric_type=name,
            metric_value=round(value, 4),
        )
        for row, values in scored
        for name, value in values.items()
        if value is not None and value == value
    ]


def _measured(suite: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the domains whose data were there."""
    return [row for row in suite["rows"] if "missing" not in row]


def _scores(results: dict[str, Any] | None) -> dict[str, Any] | None:
    """The scores with their protocol: of domains a row each, else those of one data set."""
    if not results:
        return None

    if "suite" not in results:
        views = " x ".join(map(str, results["view_size"]))
        return {**results, "domains": None, "views": views}

    # The area that a domain gives to names of the others, if that was measured.
    rows = []
    for row in _measured(results):
        wrong = row.get("wrong_names") or {}
        area = f"{sum(wrong.values()) / len(wrong):.2%}" if wrong else ""
        rows.append({**row, "wrong_area": area})
    sampling = ", ".join(sorted({row["estep"] for row in rows}))
    return {"domains": rows, "sampling": sampling, "seed": results["seed"]}


def _best_known(results: dict[str, Any] | None, classes: Sequence[str]) -> list[str]:
    """Classes by falling IoU in a suite of domains; [] without one."""
    if not results or "suite" not in results:
        return []
    found = [item for row in _measured(results) for item in row.get("per_class", {}).items()]
    ranked = sorted(found, key=lambda item: -(item[1] or 0.0))
    return list(dict.fromkeys(name for name, _ in ranked if name in classes))


def _license(description: Description, asset: str) -> tuple[str, str]:
    """The hub's license identifier, and the sentence of the card."""
    # Shipped weights with a LICENSE beside them.
    if asset:
        said = assets.terms_of(Path(assets.resolve(asset)))
        return "other", f"{said} See LICENSE for the data sets and their terms."

    # A known checkpoint: fine-tuned weights inherit its license.
    start = description.started_from
    known = catalog.find(start)
    if known and known.license:
        said = f"Derived from {known.hub_id}, whose license ({known.license}) binds these weights too."
        return known.license, said

    # Shipped weights with terms of their own pass them on.
    own_terms = assets.terms_of(Path(assets.resolve(start))) if start.startswith("assets:") else ""
    if own_terms:
        return "other", f"Started from {start}, whose terms bind these weights too: {own_terms}"

    # The package's own weights: where the training's data are not its own too, their terms bind.
    if start.startswith("assets:") and not set(description.datasets) <= OWN_DATA:
        known_terms = {domain.name: domain.terms for domain in DOMAINS}
        listed = ", ".join(
            f"{name} ({known_terms[name]})" for name in description.datasets if name in known_terms
        )
        said = "Started from weights under the Apache License 2.0; the terms of the data bind their use"
        return "other", f"{said}{': ' if listed else ''}{listed}."

    # Otherwise they inherit it; random ones, or a start whose license is unknown, come last.
    if start.startswith("assets:"):
        return OWN_LICENSE, "Apache License 2.0, as the weights that it started from."
    if start == RANDOM:
        return "other", "Trained from random weights; the licenses of the data above bind their use."
    return "other", f"Derived from {_public(start)}, whose license binds these weights too."


def _public(reference: str) -> str:
    """A reference without this machine's paths: a local folder is reduced to its name."""
    return Path(reference).name if reference.startswith(("/", ".", "~")) else catalog.expand(reference)
