# SPDX-License-Identifier: Apache-2.0
"""Markdown tables and pages of results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from digseg_jax.config.sampling import EStep

MOST_LINES = 60  # classes that the log lists


def percent(value: Any) -> str:
    """A share (0..1) as percent with two decimals; a dash for an undefined value, text unchanged."""
    if isinstance(value, str):
        return value
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.2f}"


def input_size(asked: Mapping[str, Any]) -> str:
    """Describes the network's input in words, from the entries of `Evaluator.asked`."""
    height, width = asked["view_size"]
    view = f"{height}x{width}"
    if asked["inference"] != "window":
        return f"{asked['inference']} image in {view}"
    side = f"short side {asked['short_side']}" if asked["short_side"] else "the image's own size"
    return f"windows of {view}, {side}"


def prompt_forms(asked: Mapping[str, Any]) -> str:
    """Templates of the prompts, quoted; a dash if the text does not depend on the class."""
    return ", ".join(f'"{template}"' for template in asked["templates"]) or "–"


def trained_on(about: Mapping[str, Any] | None) -> str:
    """A sentence on the weights' training, from `Description.provenance`."""
    if not about:
        return "Nothing is known of the weights' training."
    datasets = ", ".join(about["datasets"])
    return f"Weights trained on {datasets}, {about['steps']} steps from {about['started_from']}."


def estep_of(results: Mapping[str, Any]) -> str:
    """The E-Step of results.json, as "4x2:leading"; results of earlier versions lack the spacing."""
    spacing = results.get("spacing") or "trailing"
    return str(EStep(results["ensemble"], results["steps"], spacing))


def class_lines(per_class: Mapping[str, float | None]) -> str:
    """Lines of names and IoU in percent, best first; of very many classes the middle is left out."""
    known = sorted(per_class.items(), key=lambda entry: -1 if entry[1] is None else entry[1])[::-1]
    width = max(map(len, per_class), default=0)
    lines = [f"  {name:<{width}} {percent(iou):>6}" for name, iou in known]
    if len(lines) > MOST_LINES:
        half = MOST_LINES // 2
        lines[half:-half] = [f"  ... {len(lines) - 2 * half} more in results.md"]
    return "\n".join(lines)


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table of text and numbers, with `|` escaped."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines) + "\n"


def _cell(value: Any) -> str:
    """Text of one cell: four significant digits for a float, no line breaks."""
    if value is None:
        return "–"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def results_markdown(results: dict[str, Any]) -> str:
    """The content of results.json as a Markdown page: scores, classes and protocol."""
    scores = [
        [name, percent(results.get(key))]
        for name, key in (
            ("mIoU", "miou"),
            ("pixel accuracy", "accuracy"),
            ("mean accuracy", "mean_accuracy"),
            ("fwIoU", "fwiou"),
        )
    ]

    # Scores in results.json are shares (0..1); the page prints percent.
    classes = [[name, percent(value)] for name, value in results["per_class"].items()]
    estep = f"E-Step {estep_of(results)}"
    lines = [
        f"# {results['dataset']}, {results['split']} split: measured by this run\n",
        f"{results['num_images']} images, {estep}, seed {results['seed']}. {results['protocol']}.\n",
        f"{trained_on(results.get('weights'))} Prompts: {prompt_forms(results)}. Input: "
        f"{input_size(results)}.\n",
        markdown(["score", "percent"], scores),
        markdown(["class", "IoU, percent"], classes),
    ]
    return "\n".join(lines)
