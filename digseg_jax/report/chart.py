# SPDX-License-Identifier: Apache-2.0
"""Training curves: loss on a logarithmic axis, and validation mIoU; chart.html.j2 draws them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from digseg_jax.viz.templates import is_number

Point = tuple[float, float]  # step, value


@dataclasses.dataclass(frozen=True)
class Frame:
    """Size of a drawing and the edges of its axes, in units of its viewBox."""

    width: int = 620
    height: int = 300
    left: int = 60
    end: int = 602  # right edge
    top: int = 10
    base: int = 270  # lower edge


FRAME = Frame()
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


def thin(count: int, most: int = _MOST_POINTS) -> list[int]:
    """Indices of at most `most` evenly picked ones of `count` points, and of the last one."""
    kept = list(range(0, count, max(1, math.ceil(count / most))))
    return kept if not kept or kept[-1] == count - 1 else [*kept, count - 1]


def log_ticks(low: float, high: float) -> list[float]:
    """Round values between low and high for a logarithmic axis, at least three if possible."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        # parsed from text, so that 0.3 is the float that prints as 0.3
        ticks = [float(f"{d}e{e}") for e in decades for d in digits]
        ticks = [t for t in ticks if low <= t <= high]
        if len(ticks) >= 3:
            return ticks

    # On a plateau such as 0.21 to 0.28 a logarithm is nearly straight.
    return linear_ticks(low, high)


def linear_ticks(low: float, high: float, about: int = 5, least: float = 0.0) -> list[float]:
    """Round values between low and high, roughly `about` of them, at least `least` apart."""
    if high <= low:
        return [low]

    # The next distance of the form 1, 2 or 5 times a power of ten; 0.999 and 1e-9 forgive rounding.
    raw = max((high - low) / about, least)
    power = math.floor(math.log10(raw))
    stride = next(m * 10.0**power for m in (1, 2, 5, 10) if m * 10.0**power >= raw * 0.999)
    first = math.ceil(low / stride - 1e-9)
    ticks = range(first, math.floor(high / stride + 1e-9) + 1)
    return [round(i * stride, 2 - power) for i in ticks]


def _path(curve: Sequence[Point], x: Callable[..., float], y: Callable[..., float]) -> str:
    """SVG path through the points, in drawing coordinates."""
    return "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in curve)


@dataclasses.dataclass(frozen=True)
class Chart:
    """A drawing in `FRAME`.

    Attributes:
      label: what it shows, for readers who do not see it.
      levels, steps: (coordinate, text) of the ticks of both axes.
      curves: (CSS class, SVG path) of each line.
      hover: JSON list of [x, y, text that is shown there].
      step, value: the point that the caption names.
      dots: (x, y) of marked points.
    """

    title: str
    label: str
    levels: list[tuple[float, str]]
    steps: list[tuple[float, str]]
    curves: list[tuple[str, str]]
    hover: str
    step: float
    value: float
    dots: Sequence[Point] = ()
    frame: Frame = FRAME


def _step_axis(low: float, high: float) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """Mapping of a step to its x coordinate, and the ticks of the axis."""
    span = (high - low) or 1.0
    width = FRAME.end - FRAME.left

    def x(step: float) -> float:
        return FRAME.left + width * (step - low) / span

    # Steps are whole numbers: a few of them are not divided.
    return x, [(x(tick), f"{tick:,.0f}") for tick in linear_ticks(low, high, 6, least=1)]


def _levels(ticks: Sequence[float], y: Callable[[float], float]) -> list[tuple[float, str]]:
    """Ticks of the vertical axis."""
    return [(y(tick), f"{tick:g}") for tick in ticks]


def _hover(found: Sequence[tuple[float, float, str]]) -> str:
    """What the script shows at which point, as JSON."""
    return json.dumps([[round(x, 1), round(y, 1), text] for x, y, text in found])


def loss_chart(metrics: Sequence[dict[str, Any]]) -> Chart | None:
    """The loss over steps on a logarithmic axis; None below two positive values."""
    # A logarithm needs positive values.
    curve = [p for p in points(metrics, "loss") if p[1] > 0]
    if len(curve) < 2:
        return None

    # A margin above and below, so that a nearly constant loss is not stretched to the whole height.
    values = [v for _, v in curve]
    low, high = math.log(min(values)), math.log(max(values))
    room = max(0.06 * (high - low), 0.02)
    low, high = low - room, high + room
    x, step_ticks = _step_axis(curve[0][0], curve[-1][0])
    scale = (FRAME.base - FRAME.top) / (high - low)

    def y(value: float) -> float:
        return FRAME.top + scale * (high - math.log(value))

    # Smooth before thinning: the mean is over all logged values.
    kept, smoothed = thin(len(curve)), smooth(curve)
    drawn, mean = [curve[i] for i in kept], [smoothed[i] for i in kept]
    hover = [
        (x(s), y(m), f"step {s:,} · {v:.4g} · smoothed {m:.4g}")
        for (s, v), (_, m) in zip(drawn, mean, strict=True)
    ]
    first, last = curve[0], curve[-1]
    return Chart(
        title="Loss",
        label=f"Training loss, from {first[1]:.3g} at step {first[0]} to {last[1]:.3g} at {last[0]}",
        levels=_levels(log_ticks(math.exp(low), math.exp(high)), y),
        steps=step_ticks,
        curves=[("raw", _path(drawn, x, y)), ("mean", _path(mean, x, y))],
        hover=_hover(hover),
        step=last[0],
        value=last[1],
    )


def miou_chart(metrics: Sequence[dict[str, Any]]) -> Chart | None:
    """val_miou over steps, its axis beginning at 0; None if no line has it."""
    curve = points(metrics, "val_miou")
    if not curve:
        return None

    # The same range of steps as the loss above it.
    steps = [m["step"] for m in metrics]
    x, step_ticks = _step_axis(min(steps), max(steps))
    top = min(1.0, 1.15 * max(v for _, v in curve)) or 1.0

    def y(value: float) -> float:
        return FRAME.base - (FRAME.base - FRAME.top) * value / top

    # Evaluations are few: each one is marked.
    best = max(curve, key=lambda p: p[1])
    return Chart(
        title="Validation mIoU",
        label=f"Validation mIoU over steps, best {best[1]:.3f} at step {best[0]}",
        levels=_levels(linear_ticks(0, top, 4), y),
        steps=step_ticks,
        curves=[("mean", _path(curve, x, y))],
        hover=_hover([(x(s), y(v), f"step {s:,} · {v:.3f}") for s, v in curve]),
        step=best[0],
        value=best[1],
        dots=[(x(step), y(value)) for step, value in curve],
    )


def training_charts(metrics: Sequence[dict[str, Any]]) -> dict[str, Chart | None] | None:
    """Both charts; None if there is nothing to draw."""
    charts = {"loss": loss_chart(metrics), "miou": miou_chart(metrics)}
    return charts if any(charts.values()) else None
