"""Charts as inline SVG: differences with intervals, and training curves with bands over replicates.

Colours are CSS variables of the page, so that charts follow dark mode and print well.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np

from harness.report.curves import Floats, fill_gaps, moving_average
from harness.report.html import Tone

WIDTH = 560
PLOT_WIDTH, PLOT_HEIGHT = 480, 270
COLOURS = 8
GRID_POINTS = 240
MOST_LETTERS = 22


@dataclass(frozen=True)
class Interval:
    """One difference with its 95% interval, and an inner interval that covers the noise of training alone."""

    label: str
    value: float
    low: float
    high: float
    inner_low: float
    inner_high: float
    verdict: str
    tone: Tone


@dataclass(frozen=True)
class Curve:
    """A recipe's training curve: mean and range over replicates at each of `tokens`."""

    label: str
    tokens: Floats
    mean: Floats
    low: Floats
    high: Floats


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers that cover most of [low, high]."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def forest(intervals: Sequence[Interval], unit: str) -> str:
    """Return a chart of differences with their 95% intervals, one a row, around a line at zero; `unit` in words."""
    row, top, left, right = 30, 8, 210, 16  # 22 letters fit on the left, also where a phone enlarges them
    ends = [0.0, *(x for item in intervals for x in (item.low, item.high) if math.isfinite(x))]
    pad = 0.05 * (max(ends) - min(ends) or 1.0)
    low, high = min(ends) - pad, max(ends) + pad
    height = top + row * len(intervals) + 40

    def x(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * (WIDTH - left - right)

    bottom = top + row * len(intervals)
    parts = []
    for tick in nice_ticks(low, high):
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick:+.3g}</text>'
        )
    parts.append(f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{top}" y2="{bottom}"/>')
    for number, item in enumerate(intervals):
        y = top + row * (number + 0.5)
        title = f"{item.label}: {item.value:+.4f} ({item.low:+.4f} to {item.high:+.4f}), {item.verdict}"
        parts.append(
            f'<g class="{item.tone}"><title>{escape(title)}</title>'
            f"{text('label', left - 10, y + 4, shortened(item.label), 'end')}"
            f'<line class="interval" x1="{x(item.low):.1f}" x2="{x(item.high):.1f}" y1="{y}" y2="{y}"/>'
            f'<line class="inner" x1="{x(item.inner_low):.1f}" x2="{x(item.inner_high):.1f}" y1="{y}" y2="{y}"/>'
            f'<circle cx="{x(item.value):.1f}" cy="{y}" r="5"/></g>'
        )
    parts.append(text("tick", left, height - 6, unit))
    return _svg(height, "Differences from the baseline with 95% intervals", parts)


def curves(series: Sequence[Curve], unit: str) -> str:
    """Draw training curves in a unit over tokens, each with its band; values of the first tenth may be cut off."""
    height, left, right, top, bottom = 360, 52, 12, 10, 40
    late = [np.concatenate([item.low[len(item.low) // 10 :], item.high[len(item.high) // 10 :]]) for item in series]
    values = np.concatenate(late)
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    high = high if high > low else low + 1.0
    most = max(float(item.tokens[-1]) for item in series)

    def x(tokens: float) -> float:
        return left + tokens / most * (WIDTH - left - right)

    def y(loss: float) -> float:
        return top + (high - loss) / (high - low) * (height - top - bottom)

    parts = [
        f'<clipPath id="plot"><rect x="{left}" y="{top}" width="{WIDTH - left - right}" '
        f'height="{height - top - bottom}"/></clipPath>'
    ]
    for tick in nice_ticks(low, high):
        parts.append(f'<line class="grid" x1="{left}" x2="{WIDTH - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(text("tick", left - 6, y(tick) + 4, f"{tick:.4g}", "end"))
    for tick in nice_ticks(0, most):
        parts.append(text("tick", x(tick), height - 22, in_short(tick), "middle"))
    for number, item in enumerate(series):
        usable = np.isfinite(item.mean)
        points = [f"{x(t):.1f},{y(v):.1f}" for t, v in zip(item.tokens[usable], item.mean[usable], strict=True)]
        upper = [f"{x(t):.1f},{y(v):.1f}" for t, v in zip(item.tokens[usable], item.high[usable], strict=True)]
        lower = [f"{x(t):.1f},{y(v):.1f}" for t, v in zip(item.tokens[usable], item.low[usable], strict=True)]
        parts.append(
            f'<g class="curve c{number % COLOURS}" data-recipe="{number}" clip-path="url(#plot)">'
            f"<title>{escape(item.label)}</title>"
            f'<polygon points="{" ".join([*upper, *reversed(lower)])}"/><polyline points="{" ".join(points)}"/></g>'
        )
    parts.append(f'<text class="tick" x="{left}" y="{height - 5}">train loss, {unit}, by tokens trained on</text>')
    return _svg(height, "Training loss by tokens", parts)


@dataclass(frozen=True)
class Line:
    """One metric of a run at each of `steps`."""

    label: str
    steps: Floats
    values: Floats
    kind: Literal["line", "raw", "dots", "level"] = "line"
    """A line, a faint line of single steps, a line with dots where it was measured, or a dashed level."""


@dataclass(frozen=True)
class _Scale:
    """Where values at steps lie in a plot of PLOT_WIDTH x PLOT_HEIGHT."""

    first: float
    last: float
    low: float
    high: float
    left: int = 58
    right: int = 14
    top: int = 10
    bottom: int = 26

    @classmethod
    def of(cls, lines: Sequence[Line], from_zero: bool) -> "_Scale":
        """Return a scale for what lies below the highest value after the first twentieth of the steps."""
        values = np.concatenate([line.values[len(line.values) // 20 :] for line in lines])
        values = values[np.isfinite(values)]
        low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
        low = min(0.0, low) if from_zero else low
        low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
        first, last = (float(pick(line.steps[end] for line in lines)) for pick, end in ((min, 0), (max, -1)))
        return cls(first, last, low, high)

    def x(self, step: float) -> float:
        return self.left + (step - self.first) / max(1.0, self.last - self.first) * (
            PLOT_WIDTH - self.left - self.right
        )

    def y(self, value: float) -> float:
        return self.top + (self.high - value) / (self.high - self.low) * (PLOT_HEIGHT - self.top - self.bottom)

    def points(self, steps: Floats, values: Floats) -> list[str]:
        usable = np.isfinite(values)
        return [f"{self.x(s):.1f},{self.y(v):.1f}" for s, v in zip(steps[usable], values[usable], strict=True)]

    def axes(self) -> list[str]:
        parts = []
        for tick in nice_ticks(self.low, self.high):
            ends = f'x1="{self.left}" x2="{PLOT_WIDTH - self.right}" y1="{self.y(tick):.1f}" y2="{self.y(tick):.1f}"'
            parts.append(
                f'<line class="grid" {ends}/>{text("tick", self.left - 6, self.y(tick) + 5, in_short(tick), "end")}'
            )
        whole = (tick for tick in nice_ticks(self.first, self.last, 4) if tick == int(tick))
        return parts + [text("tick", self.x(tick), PLOT_HEIGHT - 6, f"{tick:,.0f}", "middle") for tick in whole]


def plot(
    title: str, lines: Sequence[Line], band: tuple[Floats, Floats] | None = None, from_zero: bool = False
) -> str:
    """Draw metrics of one run over its steps as a figure with a legend; `band` lies around the first line.

    It is narrower than the other charts, so that its words can be read on a phone.
    """
    scale, place = _Scale.of(lines, from_zero), "".join(filter(str.isalpha, title))
    inside = (
        f'x="{scale.left}" y="{scale.top - 4}" width="{PLOT_WIDTH - scale.left - scale.right + 4}" '
        f'height="{PLOT_HEIGHT - scale.top - scale.bottom + 8}"'
    )
    shapes, legend = [], []
    if band is not None:
        around = [*scale.points(lines[0].steps, band[1]), *reversed(scale.points(lines[0].steps, band[0]))]
        shapes.append(f'<g class="curve c1"><polygon points="{" ".join(around)}"/></g>')
    for number, line in enumerate(lines, start=1):
        drawn = scale.points(line.steps, line.values)
        dots = [at.split(",") for at in drawn] if line.kind == "dots" else []
        circles = "".join(f'<circle cx="{x}" cy="{y}" r="3"/>' for x, y in dots)
        shapes.append(f'<g class="curve {line.kind} c{number}"><polyline points="{" ".join(drawn)}"/>{circles}</g>')
        legend.append(f'<span class="c{number}"><span class="swatch"></span>{escape(line.label)}</span>')
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {PLOT_WIDTH} {PLOT_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}"><clipPath id="{place}"><rect {inside}/></clipPath>{"".join(scale.axes())}'
        f'<g clip-path="url(#{place})">{"".join(shapes)}</g></svg>'
        f'<div class="legend">{"".join(legend)}</div></figure>'
    )


def curve_of(label: str, runs: Sequence[tuple[Floats, Floats]]) -> Curve | None:
    """Average the curves (tokens, losses) of replicates, smoothed over a thirtieth of the steps; None without any."""
    usable = [
        (tokens, moving_average(fill_gaps(losses), max(1, len(losses) // 30)))
        for tokens, losses in runs
        if len(tokens) > 1
    ]
    if not usable:
        return None
    end = min(tokens[-1] for tokens, _ in usable)
    grid = np.linspace(min(tokens[0] for tokens, _ in usable), end, GRID_POINTS)
    table = np.array([np.interp(grid, tokens, losses) for tokens, losses in usable])
    return Curve(label, grid, table.mean(axis=0), table.min(axis=0), table.max(axis=0))


def in_short(value: float) -> str:
    """Return a count with a letter for thousands, millions and billions."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def shortened(label: str) -> str:
    """Shorten a label to fit beside a chart; the tooltip has it in full."""
    return label if len(label) <= MOST_LETTERS else label[: MOST_LETTERS - 1] + "…"


def text(kind: str, x: float, y: float, words: str, anchor: str = "start") -> str:
    """Return an SVG text element with CSS class `kind`."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{escape(title)}">' + "".join(parts) + "</svg>"
    )
