# SPDX-License-Identifier: Apache-2.0
"""Training curves as inline SVG: loss on a logarithmic axis, and validation mIoU."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from digseg_jax.report.markup import esc, is_number, number

Point = tuple[float, float]  # step, value

# Size of a drawing and its margins, in units of its viewBox.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 620, 300, 60, 18, 10, 30
_MOST_POINTS = 400  # per curve; more would not be visible at this width


def points(metrics: Sequence[dict[str, Any]], name: str) -> list[Point]:
    """(step, value) of each line that has a finite value of that name, in order of step."""
    found = [(m["step"], m[name]) for m in metrics if is_number(m.get(name))]
    return sorted(found, key=lambda p: p[0])


def smooth(curve: Sequence[Point], share: float = 0.05) -> list[Point]:
    """Centered geometric mean over about `share` of the points; values must be positive.

    The window grows from the first point on, so that the steep start is not flattened.
    """
    # Differences of running sums: one pass, whatever the window.
    reach = round(share * len(curve) / 2)
    sums = [0.0, *itertools.accumulate(math.log(value) for _, value in curve)]
    smoothed = []
    for i, (step, _) in enumerate(curve):
        # `reach` points on either side; fewer at the start, as many before as after
        first, end = i - min(i, reach), min(i + min(i, reach) + 1, len(curve))
        smoothed.append((step, math.exp((sums[end] - sums[first]) / (end - first))))
    return smoothed


def thin(curve: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """At most `most` evenly picked points, and the last one; no values are averaged."""
    stride = math.ceil(len(curve) / most)
    kept = list(curve[::stride]) if stride > 1 else list(curve)
    return kept if not curve or kept[-1] == curve[-1] else [*kept, curve[-1]]


def log_ticks(low: float, high: float) -> list[float]:
    """Round values between low and high for a logarithmic axis, at least three if possible."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        # parsed from text, so that 0.3 is the float that prints as 0.3
        ticks = [float(f"{d}e{e}") for e in decades for d in digits]
        ticks = [t for t in ticks if low <= t <= high]
        if len(ticks) >= 3:
            break
    return ticks


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values between low and high, roughly `about` of them."""
    if high <= low:
        return [low]

    # The next distance of the form 1, 2 or 5 times a power of ten; 0.999 and 1e-9 forgive rounding.
    raw = (high - low) / about
    base = 10.0 ** math.floor(math.log10(raw))
    stride = next(base * m for m in (1, 2, 5, 10) if base * m >= raw * 0.999)
    first = math.ceil(low / stride - 1e-9)
    return [round(i * stride, 10) for i in range(first, math.floor(high / stride + 1e-9) + 1)]


def _path(curve: Sequence[Point], x: Callable[..., float], y: Callable[..., float]) -> str:
    """SVG path through the points, in drawing coordinates."""
    return "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in curve)


def _steps(low: float, high: float) -> tuple[Callable[[float], float], list[float]]:
    """Mapping of a step to its x coordinate, and the ticks of the axis."""
    span = (high - low) or 1.0
    width = _WIDTH - _LEFT - _RIGHT
    return lambda s: _LEFT + width * (s - low) / span, linear_ticks(low, high, 6)


def _axes(
    x: Callable[[float], float],
    y: Callable[[float], float],
    ticks: tuple[list[float], list[float]],
) -> str:
    """Grid lines and labels.

    ticks: of x, of y.
    """
    parts = []
    for t in ticks[1]:
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" '
            f'y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
            f'<text x="{_LEFT - 8}" y="{y(t) + 4:.1f}" text-anchor="end">{t:g}</text>'
        )

    # Steps below, without lines.
    for t in ticks[0]:
        parts.append(
            f'<text x="{x(t):.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">{t:,.0f}</text>'
        )
    base = _HEIGHT - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    return "".join(parts)  # fmt: skip


def _figure(
    title: str, body: str, label: str, hover: Sequence[tuple[float, float, str]], caption: str
) -> str:
    """A chart with title and caption.

    hover: for each point x, y in the drawing and the text that the script shows.
    """
    data = esc(json.dumps([[round(a, 1), round(b, 1), text] for a, b, text in hover]))
    return (
        f'<figure class="chart"><div class="chart-head"><h3>{title}</h3>'
        '<p class="readout" aria-hidden="true"></p></div>'
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{esc(label)}" '
        f'data-points="{data}">{body}<g class="probe" hidden>'
        f'<line y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/><circle r="4"/></g></svg>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def loss_chart(metrics: Sequence[dict[str, Any]]) -> str:
    """Figure of the loss over steps on a logarithmic axis; empty below two positive values."""
    # A logarithm needs positive values.
    curve = [p for p in points(metrics, "loss") if p[1] > 0]
    if len(curve) < 2:
        return ""

    # A margin above and below, so that a nearly constant loss is not stretched to the whole height.
    values = [v for _, v in curve]
    low, high = math.log(min(values)), math.log(max(values))
    room = max(0.06 * (high - low), 0.02)
    low, high = low - room, high + room
    x, step_ticks = _steps(curve[0][0], curve[-1][0])
    scale = (_HEIGHT - _TOP - _BOTTOM) / (high - low)

    def y(value: float) -> float:
        return _TOP + scale * (high - math.log(value))

    # Smooth before thinning: the mean is over all logged values.
    drawn, mean = thin(curve), thin(smooth(curve))
    ticks = (step_ticks, log_ticks(math.exp(low), math.exp(high)))
    body = _axes(x, y, ticks)
    body += f'<path class="raw" d="{_path(drawn, x, y)}"/>'
    body += f'<path class="mean" d="{_path(mean, x, y)}"/>'

    # Texts for the pointer, and for readers who do not see the drawing.
    hover = [
        (x(s), y(m), f"step {s:,} · {v:.4g} · smoothed {m:.4g}")
        for (s, v), (_, m) in zip(drawn, mean, strict=True)
    ]
    first, last = curve[0], curve[-1]
    label = f"Training loss, from {first[1]:.3g} at step {first[0]} to {last[1]:.3g} at {last[0]}"
    caption = (
        "Against step, on a logarithmic axis. Thin: as logged, thick: smoothed. Last "
        f"{number(last[1], 4)} at step {number(last[0])}."
    )
    return _figure("Loss", body, label, hover, caption)


def miou_chart(metrics: Sequence[dict[str, Any]]) -> str:
    """Figure of val_miou over steps, its axis beginning at 0; empty if no line has it."""
    curve = points(metrics, "val_miou")
    if not curve:
        return ""

    # The same range of steps as the loss above it.
    steps = [m["step"] for m in metrics]
    x, step_ticks = _steps(min(steps), max(steps))
    top = min(1.0, 1.15 * max(v for _, v in curve)) or 1.0

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value / top

    # Evaluations are few: each one is marked.
    body = _axes(x, y, (step_ticks, linear_ticks(0, top, 4)))
    body += f'<path class="mean" d="{_path(curve, x, y)}"/>'
    for step, value in curve:
        body += f'<circle class="dot" cx="{x(step):.1f}" cy="{y(value):.1f}" r="4"/>'

    hover = [(x(s), y(v), f"step {s:,} · {v:.3f}") for s, v in curve]
    best = max(curve, key=lambda p: p[1])
    label = f"Validation mIoU over steps, best {best[1]:.3f} at step {best[0]}"
    caption = (
        "Measured on validation images while training. Best "
        f"{number(best[1])} at step {number(best[0])}."
    )
    return _figure("Validation mIoU", body, label, hover, caption)
