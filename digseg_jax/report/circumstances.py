# SPDX-License-Identifier: Apache-2.0
"""The circumstances of a run on its page: date, hardware, hours, versions, command, configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from digseg_jax.report.markup import esc, is_number, section, significant


def run_section(
    speed: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any] | None,
    results: Mapping[str, Any],
) -> str:
    """Section of the run's circumstances, the queries that were asked and the whole configuration.

    speed: content of eval/speed.json. metrics: lines of metrics.jsonl.
    """
    blocks = [_facts(speed, metrics, config)]
    if queries := results.get("queries"):
        chips = "".join(f"<li>{esc(q)}</li>" for q in queries)
        blocks.append(
            f'<details><summary>Queries asked</summary><ul class="words">{chips}</ul></details>'
        )

    if config is not None:
        text = esc(json.dumps(config, indent=2, ensure_ascii=False))
        blocks.append(
            "<details><summary>Configuration</summary>"
            f'<pre class="scroll" tabindex="0" aria-label="Configuration">{text}</pre></details>'
        )
    return section("run", "The run", "".join(blocks))


def _facts(
    speed: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any] | None,
) -> str:
    """List of what is known of the run; nothing is said of what is unknown."""
    rows = []
    if hours := training_hours(metrics, config):
        rows.append(("Training", f"{significant(hours)} hours, validation and saving included"))

    # Of the evaluation; older runs recorded only its speed.
    if "date" in speed:
        rows.append(("Evaluated", f"{esc(speed['date'])} on {esc(speed['devices'])}"))
    if is_number(speed.get("images_per_second")):
        images, queries = (significant(speed.get(f"{of}_per_second")) for of in ("images", "queries"))
        rows.append(("Speed", f"{images} images and {queries} queries per second"))
    if versions := speed.get("versions"):
        rows.append(("Versions", esc(", ".join(f"{k} {v}" for k, v in versions.items()))))
    if command := speed.get("command"):
        rows.append(("Command", f"<code>{esc(command)}</code>"))
    body = "".join(f"<div><dt>{term}</dt><dd>{value}</dd></div>" for term, value in rows)
    return f'<dl class="facts">{body}</dl>' if body else ""


def training_hours(
    metrics: Sequence[Mapping[str, Any]], config: Mapping[str, Any] | None
) -> float | None:
    """Hours that the recorded steps took; None if that is not known.

    Steps that a killed run had to train again count once.
    """
    batch = ((config or {}).get("train") or {}).get("batch_size")
    known = [m for m in metrics if is_number(m.get("images_per_second"))]
    if not is_number(batch) or not known:
        return None

    # A line's speed is the mean over the steps since the line before.
    seconds, last = 0.0, 0
    for line in known:
        seconds += (line["step"] - last) * batch / max(line["images_per_second"], 1e-9)
        last = line["step"]
    return seconds / 3600
