# SPDX-License-Identifier: Apache-2.0
"""Tables of a suite: measured scores beside the paper's figures, one score per line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from digseg_jax.evaluation import paper
from digseg_jax.evaluation.tables import input_size, markdown, percent, prompt_forms, trained_on

COLUMNS = (
    "suite",
    "data set",
    "E-Step",
    "prompts",
    "input",
    "protocol",
    "score",
    "measured",
    "the paper's figure",
    "images/s",
    "queries/s",
)
MOST_REASON = 90  # letters of the reason why a row was not measured


def lines(results: Mapping[str, Any]) -> list[list[Any]]:
    """Table rows in the order of `COLUMNS` from suite_NAME.json; scores in percent."""
    found = []
    for row in results["rows"]:
        where = [row["suite"], row["dataset"], row["estep"]]
        if "missing" in row:
            found.append([*where, *"–––", not_measured(row), *"––––"])
            continue
        asked = [prompt_forms(row), input_size(row)]
        found += [[*where, *asked, *cells] for cells in _cells(row)]
    return found + _mean_of_domains(results["rows"])


def not_measured(row: Mapping[str, Any]) -> str:
    """Why a row has no scores, in short: without a remedy, and without the middle of a long path."""
    reason = str(row["missing"]).partition("; ")[0]
    if len(reason) > MOST_REASON:
        reason = f"{reason[: MOST_REASON // 3]} … {reason[-MOST_REASON // 2 :]}"
    return f"not measured: {reason}"


def _mean_of_domains(rows: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The line with the mean over all measured domains; none for the paper's suites.

    A user's own folder is no domain: with it, means of two machines would not be of the same data.
    """
    scored = [row for row in rows if row.get("asked_miou") is not None]
    known = [row for row in scored if not row.get("unlisted")]
    if len(known) < 2:
        return []
    mean = sum(row["asked_miou"] for row in known) / len(known)
    others = len(scored) - len(known)
    without = f" (without {others} other folder{'s' * (others > 1)})" if others else ""
    where = [known[0]["suite"], f"mean of {len(known)} domains{without}", known[0]["estep"]]
    return [[*where, *"–––", "mean IoU", percent(mean), *"–––"]]


def note(results: Mapping[str, Any]) -> str:
    """Introduction to the table: how to read its numbers."""
    about = trained_on(results.get("weights"))
    if results["suite"] == "domains":
        return (
            f"Domains, seed {results['seed']}; percent. {about} Each domain is seen at its own scale; "
            "its score is the mean IoU of the classes that were asked for and occur. A background is "
            "what no class claims. Names of other domains should cover nothing. Folders that are no "
            "domains are seen with config.eval.short_side and do not count in the mean."
        )
    return (
        f"Suite {results['suite']}, seed {results['seed']}; percent. {about} Oracle asks only for "
        "classes that the truth contains and does not compare with the other protocols. The paper's "
        "figures are quoted from its project page, for its own weights and hardware."
    )


def table(results: dict[str, Any]) -> str:
    """The suite's table as Markdown, below its note."""
    return note(results) + "\n\n" + markdown(COLUMNS, lines(results))


def _cells(row: dict[str, Any]) -> list[list[Any]]:
    """Cells of one data set from "protocol" on, a list per score."""
    suite, dataset, speed = row["suite"], row["dataset"], row.get("images_per_second")
    headline = row["headline_protocol"]

    # A label map: one line per protocol. The paper's figure stands beside the headline's only.
    if row["metric"] == "miou":
        cells = []
        for protocol, scores in row["protocols"].items():
            stated = _stated(row) if protocol == headline else "–"
            rates = [_rate(scores[k]) for k in ("images_per_second", "queries_per_second")]
            cells.append([protocol, "mIoU", percent(scores["miou"]), stated, *rates])
        return [*cells, [headline, "boundary IoU", percent(row["boundary_iou"]), *"–––"]]

    # A domain of the generalist: the classes that were asked for, pooled over the split.
    rate = _rate(speed) if speed else "–"
    if row["metric"] == "asked":
        images = f"{row['num_images']} of {row['split']}"
        what = f"mean IoU (classes: {row['scored']}, images: {images})"
        cells = [[headline, what, percent(row["asked_miou"]), "–", rate, "–"]]
        if wrong := row.get("wrong_names"):
            area = sum(wrong.values()) / len(wrong)
            what = f"mean area of {len(wrong)} names of other domains"
            cells.append([headline, what, percent(area), *"–––"])
        return cells

    # A data set with a metric of its own: Dice of nested regions (optic disc and cup) ...
    if row["metric"] == "region_dice":
        names = ("disc_dice", "cup_dice", "cdr_error")
        return [
            [headline, n, percent(row[n]), paper.figure(suite, dataset, n), rate, "–"]
            for n in names
            if n in row
        ]

    # ... or scores of a foreground class, at the default threshold and at the one that was searched for
    # on training images.
    cells = _foreground_cells(row, row, f"threshold {row['threshold']}", rate)
    if "searched" in row:
        found = row["searched"]
        label = f"threshold {found['threshold']}, found on {found['split']}"
        cells += _foreground_cells(row, found, label, "–", searched=True)
    return [[headline, *line] for line in cells]


def _foreground_cells(
    row: Mapping[str, Any],
    scores: Mapping[str, Any],
    label: str,
    rate: str,
    *,
    searched: bool = False,
) -> list[list[Any]]:
    """Lines of a foreground class, pooled over the split, then as means over images.

    The paper's figures are compared with the pooled scores.

    Args:
      row: row of the data set.
      scores: its scores at the default threshold, or at the one that was searched for.
      label: the threshold in words.
      rate: images per second, as text.
      searched: whether the threshold of `scores` was searched for.
    """
    lines = []
    for way in ("pooled", "per_image"):
        for name in ("iou", "precision", "recall", "f1"):
            stated = "–"
            if way == "pooled":
                stated = paper.figure(row["suite"], row["dataset"], name, searched=searched)
            score = percent(scores[f"{name}_{way}"])
            lines.append([f"{name} {way}, {label}", score, stated, rate, "–"])
    return lines


def _rate(value: float) -> str:
    """A rate with three digits, as plain digits: 1230, not 1.23e+03."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def _stated(row: dict[str, Any]) -> str:
    """The paper's mIoU in percent; in the semantic suite, its mIoU under this E-Step, or a dash."""
    if row["suite"] == "semantic":
        if row["estep"] not in paper.ESTEP:
            return "–"
        coco, ade, fps = paper.ESTEP[row["estep"]]
        return f"{coco if row['dataset'] == 'coco_stuff' else ade} at {fps} FPS"
    return paper.figure(row["suite"], row["dataset"], "miou")
