# SPDX-License-Identifier: Apache-2.0
"""The circumstances of a run on its page: date, hardware, hours, versions, command, configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from digseg_jax.viz.templates import is_number


def circumstances(
    speed: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any] | None,
    results: Mapping[str, Any],
) -> dict[str, Any] | None:
    """What is known of a run, the queries that were asked and the whole configuration, as text.

    speed: content of eval/speed.json. metrics: lines of metrics.jsonl. None: nothing is known.
    """
    # Of the evaluation; older runs recorded only its speed.
    facts = {
        "hours": training_hours(metrics, config),
        "date": speed.get("date"),
        "devices": speed["devices"] if "date" in speed else None,
        "images_per_second": speed.get("images_per_second"),
        "versions": ", ".join(f"{k} {v}" for k, v in (speed.get("versions") or {}).items()),
        "command": speed.get("command"),
    }

    # A speed without a number is not shown.
    known = any(is_number(v) and v or isinstance(v, str) and v for v in facts.values())
    found = {
        **facts,
        "any_fact": known,
        "queries_per_second": speed.get("queries_per_second"),
        "queries": results.get("queries"),
        "config": None if config is None else json.dumps(config, indent=2, ensure_ascii=False),
    }
    return found if known or found["queries"] or found["config"] else None


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
        new = max(0, line["step"] - last)
        seconds += new * batch / max(line["images_per_second"], 1e-9)
        last += new
    return seconds / 3600
