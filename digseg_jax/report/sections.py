# SPDX-License-Identifier: Apache-2.0
"""Sections of the page that state numbers: headline, text test, classes, tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from digseg_jax.evaluation.tables import input_size, prompt_forms
from digseg_jax.report.markup import (
    MANY,
    esc,
    is_number,
    number,
    percent,
    search_field,
    section,
    significant,
    table,
)

# ensemble rule -> how the members' probabilities become one
_COMBINED = {
    "mean": "; their probabilities are averaged",
    "median": "; the median of their probabilities counts",
    "vote": "; the share of them that chose the query counts",
}
# word in the protocol's description -> its meaning for a reader
_PROTOCOLS = {
    "oracle": "only classes that the truth contains are asked for, which is easier than asking all",
    "gated": "all classes are asked for, and those judged absent are left out",
    "exhaustive": "every class is asked for on every image",
}


def _fact(term: str, value: str, meaning: str) -> str:
    """An entry of a list of numbers: name, value and meaning, all ready HTML."""
    return f'<div><dt>{term}</dt><dd>{value}</dd><dd class="meaning">{meaning}</dd></div>'


def _provenance(results: Mapping[str, Any]) -> str:
    """What was measured, and what is known of the weights; nothing is said of what is unknown."""
    sentences = [
        f"<strong>Measured by this run</strong> on the {esc(results['split'])} split of "
        f"{esc(results['dataset'])} (seed {esc(results['seed'])})."
    ]

    # Older results say less about their weights, so every entry is optional.
    weights = results.get("weights") or {}
    if is_number(weights.get("parameters")):
        sentences.append(f"The model has {number(weights['parameters'])} trained parameters.")
    if datasets := weights.get("datasets"):
        trained = f"Its weights were trained on {esc(', '.join(datasets))}"
        if results["dataset"] not in datasets:
            trained += ", not on this data set"
        if is_number(weights.get("steps")):
            plural = "" if weights["steps"] == 1 else "s"
            trained += f", for {number(weights['steps'])} step{plural}"
        if weights.get("started_from"):
            trained += f", from {esc(weights['started_from'])}"
        if weights.get("checkpoint"):
            trained += f" ({esc(weights['checkpoint'])})"
        sentences.append(f"{trained}.")
    return f'<p class="provenance">{" ".join(sentences)}</p>'


def headline(results: Mapping[str, Any]) -> str:
    """Section of the scores, one sentence for each, and their provenance."""
    # Entries in the order of the page; a score that was not computed has none.
    members, steps = results["ensemble"], results["steps"]
    facts = []
    if is_number(results.get("accuracy")):
        meaning = "of the labeled pixels got the right class."
        facts.append(_fact("Pixel accuracy", percent(results["accuracy"]), meaning))
    meaning = f"of the {esc(results['split'])} split."
    facts.append(_fact("Images", number(results["num_images"]), meaning))
    # The default decoder averages before the mask exists, so that no rule applies.
    combined = _COMBINED.get(results.get("ensemble_rule", ""), "")
    if results.get("decoder") == "latent_mean":
        combined = "; the mean of their latents is decoded"
    meaning = (
        f"{esc(members)} noise {'draw' if members == 1 else 'draws'} × {esc(steps)} denoising "
        f"{'step' if steps == 1 else 'steps'} for each query{combined if members > 1 else ''}."
    )
    facts.append(_fact("E × S", f"{esc(members)} × {esc(steps)}", meaning))

    # The protocol's own words, and their meaning if it is a known one.
    known = next((v for k, v in _PROTOCOLS.items() if k in str(results["protocol"]).lower()), "")
    meaning = f"{known}." if known else "how classes are asked for and counted."
    protocol = f'<span class="word">{esc(results["protocol"])}</span>'
    facts.append(_fact("Protocol", protocol, meaning))

    # How the network is asked; older results do not say.
    if "templates" in results:
        words = f'<span class="word">{esc(prompt_forms(results))}</span>'
        facts.append(_fact("Prompts", words, "with the name of a class for {}."))
    if "view_size" in results:
        seen = f'<span class="word">{esc(input_size(results))}</span>'
        facts.append(_fact("Input", seen, "of the image reaches the network at a time."))
    return (
        '<section id="scores" aria-label="Scores"><div class="scores">'
        f'<div class="hero"><p class="kicker">mean IoU</p><p class="big">{number(results["miou"])}'
        "</p><p>For each class, the pixels that prediction and truth share, divided by the pixels "
        "that either one covers; pooled over all images, then averaged over classes. "
        f"1 is perfect, 0 is no overlap.</p></div><dl>{''.join(facts)}</dl></div>"
        f"{_provenance(results)}</section>"
    )  # fmt: skip


def listening(results: Mapping[str, Any]) -> str:
    """Section on whether the masks follow the words; empty if it was not measured."""
    match, wrong = results.get("matching_iou"), results.get("wrong_query_iou")
    absent = results.get("absent_rate")

    facts = []
    if is_number(match):
        facts.append(_fact("Right word", number(match), "IoU with the mask of the class named."))
    if is_number(wrong):
        times = f" {match / wrong:.1f} times less." if is_number(match) and wrong > 0 else ""
        meaning = f"IoU when another class in the image is named instead.{times}"
        facts.append(_fact("Wrong word", number(wrong), meaning))
    if is_number(absent):
        meaning = "of pixels get probability above 0.5 for a class that is not there."
        facts.append(_fact("Absent class", percent(absent), meaning))

    lead = "A text-driven segmenter must mark what is named, and nothing when it is not there."
    body = f'<dl class="row">{"".join(facts)}</dl>' if facts else ""
    return section("text", "Does it listen to the text?", body, lead)


def class_bars(per_class: Mapping[str, Any], colors: Mapping[str, str]) -> str:
    """Section of IoU bars per class, best first; classes without a value come last."""

    def rank(entry: tuple[str, Any]) -> float:
        """Sort key: the negative IoU; a missing one counts as worse than any."""
        return -entry[1] if is_number(entry[1]) else 1.0

    rows = []
    for name, iou in sorted(per_class.items(), key=rank):
        # A class without a color of its own (not in the gallery) gets gray.
        width = 100 * min(max(iou, 0.0), 1.0) if is_number(iou) else 0.0
        color = colors.get(name, "#808080")
        rows.append(
            f'<li><span class="name">{esc(name)}</span><span class="track" aria-hidden="true">'
            f'<span class="fill" style="width:{width:.2f}%;background:{color}"></span></span>'
            f'<span class="value">{number(iou)}</span></li>'
        )

    # Many classes are set in columns, and can be searched.
    wide, find = (" many", search_field("#classes .bars li")) if len(rows) > MANY else ("", "")
    body = f'{find}<ul class="bars{wide}">{"".join(rows)}</ul>' if rows else ""

    undefined = any(not is_number(v) for v in per_class.values())
    left_out = " A dash: the class does not occur, so it has no IoU." if undefined else ""
    lead = f"IoU of each class over all images, from 0 to 1, best first.{left_out}"
    return section("classes", "Classes", body, lead)


def estep_table(estep: Mapping[str, Any]) -> str:
    """Section of the table of ensemble size x steps; the best mIoU is bold."""
    rows = estep.get("rows") or []
    scores = [r["miou"] for r in rows if is_number(r.get("miou"))]
    best = max(scores, default=None)
    spread = any(is_number(r.get("miou_std")) for r in rows)

    # Standard deviations are shown if any row has one.
    cells = []
    for row in rows:
        # Several rows may share the best score.
        score = number(row.get("miou"))
        if is_number(row.get("miou")) and row["miou"] == best:
            score = f"<strong>{score}</strong>"
        if is_number(row.get("miou_std")):
            score += f' <span class="std">± {number(row["miou_std"])}</span>'
        size = f"{esc(row.get('ensemble', '–'))} × {esc(row.get('steps', '–'))}"
        speed = significant(row.get("queries_per_second"))
        cells.append([size, esc(row.get("spacing", "–")), score, speed])

    columns = ["E × S", "spacing", "mIoU ± std" if spread else "mIoU", "queries/s"]
    body = table(columns, cells, esc(estep.get("note") or "")) if rows else ""
    lead = (
        "Members of the ensemble (E) against denoising steps (S): more of either costs time in "
        "proportion. The best score is bold."
    )
    return section("estep", "Ensemble and steps", body, lead)


def bench_tables(tables: Sequence[Mapping[str, Any]]) -> str:
    """Section of the tables in bench/*.json, in the order of the file names."""
    body = []
    for entry in tables:
        rows = [[significant(cell) for cell in row] for row in entry["rows"]]
        note = f'<p class="note">{esc(entry["note"])}</p>' if entry.get("note") else ""
        body.append(table(entry["columns"], rows, f"<strong>{esc(entry['title'])}</strong>") + note)
    return section("bench", "Benchmarks", "".join(body))
