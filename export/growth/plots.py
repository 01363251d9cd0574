"""The pictures of growth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

# Okabe and Ito's colours, which colour-blind readers can distinguish; markers repeat it.
_GREY = "#777777"
_FAMILIES = {
    "full": ("#000000", "s"),
    "fixed": ("#0072b2", "o"),
    "logsparse": ("#009e73", "D"),
    "axial": ("#d55e00", "^"),
    "mixture": ("#b0568a", "v"),
    "sparse": (_GREY, "x"),
}
"""Colour and marker, by the first word of a pattern's name."""
_LABEL_GAP = 0.062
"""Least distance between two labels, as a share of the height of the axes."""

Curve = Sequence[tuple[int, int]]
"""Points (tokens, bytes), in order."""


def draw_training(path: Path, curves: Mapping[str, Curve], slopes: Mapping[str, float]) -> None:
    """Peak memory over the length of the sequence, a curve for each pattern."""
    figure, axes = _begin("length L of the sequence, tokens", "peak of forward and backward")
    labels = []
    for name, curve in curves.items():
        colour = _draw(axes, name, curve, "-")
        labels.append((curve[-1], f"{name}  {slopes[name]:.2f}", colour))
    lengths = sorted({length for curve in curves.values() for length, _ in curve})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    highest = max(size for curve in curves.values() for _, size in curve)
    begin = min(size for curve in curves.values() for _, size in curve) / 2
    for power in (1.0, 1.5, 2.0):
        reach = min(lengths[-1], lengths[0] * (highest / begin) ** (1 / power))
        end = begin * (reach / lengths[0]) ** power
        axes.plot([lengths[0], reach], [begin, end], ":", color=_GREY, linewidth=1, zorder=0)
        middle = (lengths[0] * reach) ** 0.5, (begin * end) ** 0.5
        axes.annotate(
            f"$L^{{{power:g}}}$", middle, (3, -11), textcoords="offset points", color=_GREY
        )
    _label(axes, labels)
    _save(figure, path)


def draw_state(
    path: Path,
    measured: Mapping[str, Curve],
    computed: Mapping[str, Curve],
    scattered: Mapping[str, Curve],
) -> None:
    """State over position: a line of what is measured, dashed where computed; dots off the line."""
    figure, axes = _begin("tokens in the stream", "state of the stream")
    labels = []
    for name, curve in measured.items():
        colour = _draw(axes, name, curve, "-")
        beyond = computed.get(name, [])
        if beyond:
            _draw(axes, name, [curve[-1], *beyond], "--", hollow=True)
        if dots := scattered.get(name):
            axes.plot(*zip(*dots, strict=True), ".", color=colour, alpha=0.35, markersize=4)
        end = [*curve, *beyond][-1]
        labels.append((end, f"{name}  {_in_bytes(end[1])}", colour))
    _label(axes, labels)
    _save(figure, path)


def _begin(across: str, up: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4.6))
    figure.subplots_adjust(left=0.115, right=0.69, bottom=0.11, top=0.97)
    axes = figure.add_subplot()
    axes.set(xscale="log", yscale="log", xlabel=across, ylabel=up)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _in_bytes(y)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _draw(axes: Axes, name: str, curve: Curve, line: str, hollow: bool = False) -> str:
    """One curve; returns its colour."""
    colour, marker = _FAMILIES[name.partition("-")[0]]
    axes.plot(
        *zip(*curve, strict=True),
        line,
        marker=marker,
        color=colour,
        markerfacecolor="white" if hollow else colour,
        markersize=4.5,
        linewidth=1.3,
        zorder=1.9 if hollow else 2,  # the first point of what is hollow is full
    )
    return colour


def _label(axes: Axes, labels: Sequence[tuple[tuple[int, int], str, str]]) -> None:
    """Write (point, text, colour) beside the axes, in order of height and never over each other."""
    ordered = sorted(labels)
    ordered.sort(key=lambda label: label[0][1])
    axes.autoscale_view()  # heights are known only then
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [float(to_axes.transform(point)[1]) for point, _, _ in ordered]
    room = 1.0 - _LABEL_GAP * (len(heights) - 1)
    floor = 0.0
    for index, height in enumerate(heights):
        highest = room + _LABEL_GAP * index  # leaves room for those above
        floor = heights[index] = max(floor, min(height, highest))
        floor += _LABEL_GAP
    for (point, text, colour), height in zip(ordered, heights, strict=True):
        axes.annotate(
            text,
            point,
            (1.06, height),
            textcoords="axes fraction",
            color=colour,
            va="center",
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5)},
        )


def _in_bytes(size: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.3g} B"


def _save(figure: Figure, path: Path) -> None:
    # No date and no random ids: the same figures give the same file.
    with matplotlib.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
