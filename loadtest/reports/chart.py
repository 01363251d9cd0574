"""Line charts as SVG, which needs no other program, font or script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

_WIDTH: Final = 480
_HEIGHT: Final = 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 52, 42
_MOST_TICKS: Final = 8
COLOURS: Final = ("#1b6ca8", "#d1495b", "#3c8d5a", "#8f5fbf", "#c98a1b", "#4a4e69")


@dataclass(frozen=True, slots=True)
class Line:
    """Points of one thing, from left to right. dashed: it was computed, not measured."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Scale:
    """An axis from `low` to `high`, and where it has marks.

    binary: it counts in powers of two, as contexts and bytes do.
    """

    low: float
    high: float
    log: bool
    binary: bool
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        """From 0 at the low end to 1 at the high end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True, slots=True)
class Chart:
    """What is drawn. Axes with `log` leave out what is not above 0."""

    title: str
    x_label: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False
    binary_x: bool = False
    binary_y: bool = False


def draw(chart: Chart) -> str:
    """The chart as an SVG element; empty if no line has a point."""
    lines = [(line, _drawable(chart, line)) for line in chart.lines]
    lines = [(line, points) for line, points in lines if points]
    if not lines:
        return ""
    every = [point for _, points in lines for point in points]
    across = _scale([x for x, _ in every], chart.log_x, chart.binary_x)
    up = _scale([y for _, y in every], chart.log_y, chart.binary_y)
    parts = [*_frame(chart, across, up)]
    for index, (line, points) in enumerate(lines):
        parts += _line(line, points, across, up, COLOURS[index % len(COLOURS)], len(every))
        parts += _legend(line, index, COLOURS[index % len(COLOURS)])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="11" fill="#444">{"".join(parts)}</svg>'
    )


def short(value: float, binary: bool) -> str:
    """A number in few characters: 64k, 1.5M, 0.02. binary: k is 1,024."""
    step = 1024.0 if binary else 1000.0
    for suffix, power in (("G", 3), ("M", 2), ("k", 1)):
        if abs(value) >= step**power:
            return f"{value / step**power:.3g}{suffix}"
    return f"{value:.3g}"


def _drawable(chart: Chart, line: Line) -> list[tuple[float, float]]:
    return [
        (x, y)
        for x, y in line.points
        if math.isfinite(y) and (x > 0 or not chart.log_x) and (y > 0 or not chart.log_y)
    ]


def _scale(values: Sequence[float], log: bool, binary: bool) -> Scale:
    low, high = min(values), max(values)
    if not log:
        low, high = min(0.0, low), high if high > min(0.0, low) else 1.0
        step = _step(high - low, binary)
        count = math.ceil(high / step - 1e-9)
        ticks = tuple(step * i for i in range(math.floor(low / step), count + 1))
        return Scale(min(low, ticks[0]), ticks[-1], log, binary, ticks)
    base = 2.0 if binary else 10.0
    first = math.floor(math.log(low, base) + 1e-9)
    last = max(first + 1, math.ceil(math.log(high, base) - 1e-9))
    powers = [base**i for i in range(first, last + 1)]
    ticks = tuple(powers[:: math.ceil(len(powers) / _MOST_TICKS)])
    if not binary and len(powers) <= 3:
        ticks = (*(n * power for power in powers[:-1] for n in (1, 2, 5)), powers[-1])
    return Scale(powers[0], powers[-1], log, binary, ticks)


def _step(span: float, binary: bool) -> float:
    """Between two marks of a plain axis: 1, 2 or 5 times a power of ten, or a power of two."""
    rough = span / 5
    if binary:
        return float(2.0 ** math.ceil(math.log2(rough)))
    power = 10.0 ** math.floor(math.log10(rough))
    return next(n * power for n in (1, 2, 5, 10) if n * power >= rough * (1 - 1e-9))


def _x(scale: Scale, value: float) -> float:
    return _LEFT + scale.place(value) * (_WIDTH - _LEFT - _RIGHT)


def _y(scale: Scale, value: float) -> float:
    return _HEIGHT - _BOTTOM - scale.place(value) * (_HEIGHT - _TOP - _BOTTOM)


def _frame(chart: Chart, across: Scale, up: Scale) -> list[str]:
    """Title, grid, marks and the name of the lower axis."""
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [
        f'<text x="{_LEFT}" y="16" font-size="13" font-weight="600" fill="#222">'
        f"{escape(chart.title)}</text>",
        f'<text x="{(_LEFT + right) / 2:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">'
        f"{escape(chart.x_label)}</text>",
    ]
    for tick in up.ticks:
        y = _y(up, tick)
        parts.append(
            f'<path d="M{_LEFT} {y:.1f}H{right}" stroke="#ddd"/><text x="{_LEFT - 6}" '
            f'y="{y + 4:.1f}" text-anchor="end">{short(tick, up.binary)}</text>'
        )
    for tick in across.ticks:
        x = _x(across, tick)
        parts.append(
            f'<path d="M{x:.1f} {_TOP}V{bottom}" stroke="#eee"/><text x="{x:.1f}" '
            f'y="{bottom + 15}" text-anchor="middle">{short(tick, across.binary)}</text>'
        )
    parts.append(f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#888"/>')
    return parts


def _line(
    line: Line,
    points: Sequence[tuple[float, float]],
    across: Scale,
    up: Scale,
    colour: str,
    drawn: int,
) -> list[str]:
    places = [(_x(across, x), _y(up, y)) for x, y in points]
    way = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dashes = ' stroke-dasharray="5 4"' if line.dashed else ""
    parts = [f'<path d="M{way}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>']
    if not line.dashed and drawn <= 100:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
    return parts


def _legend(line: Line, index: int, colour: str) -> list[str]:
    """Where a line's name stands: three in a row, under the title."""
    x, y = _LEFT + index % 3 * 136, 30 + index // 3 * 13
    dashes = ' stroke-dasharray="5 4"' if line.dashed else ""
    return [
        f'<path d="M{x} {y - 4}h16" stroke="{colour}" stroke-width="2"{dashes}/>'
        f'<text x="{x + 20}" y="{y}">{escape(line.name)}</text>'
    ]
