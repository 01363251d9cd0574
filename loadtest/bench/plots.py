"""Two pictures of a run of the bench, and one of a server's memory over time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtest.bench.plan import Cell, Contestant, tokens_label
from loadtest.bench.report import all_rounds, tokens_per_s
from loadtest.bench.rounds import Spread
from loadtest.bench.run import CellResult, Report
from loadtest.bench.worker import OK

AGAINST_CONTEXT, AGAINST_STREAMS = "bench-context.svg", "bench-streams.svg"
_SIZE = (11, 4.5)
_MARKERS: dict[str, Any] = {"marker": "o", "markersize": 3}

Floats = npt.NDArray[np.float64]


def plot(report: Report, folder: Path) -> list[Path]:
    """Write the pictures of `report` into `folder`, which is made; those with two points or more.

    Tokens/s and bytes of a stream against context, tokens/s of all streams against their number.
    Bars go from the lower to the upper quartile of the windows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = [result for result in report.results if not result.cell.first_token]
    written = []
    for name, common, draw in (
        (AGAINST_CONTEXT, lambda cell: cell.streams, _against_context),
        (AGAINST_STREAMS, lambda cell: cell.context, _against_streams),
    ):
        if here := _most_alike(results, common):
            written.append(folder / name)
            draw(report, here, written[-1])
    return written


def _most_alike(results: Sequence[CellResult], common: Callable[[Cell], int]) -> list[CellResult]:
    """The results that share the most frequent value; none where that is of one cell alone."""
    counts = Counter(common(result.cell) for result in results)
    value, count = max(counts.items(), key=lambda item: item[1], default=(0, 0))
    return [r for r in results if common(r.cell) == value] if count > 1 else []


def plot_memory(path: Path, minutes: Floats, mib: Floats) -> None:
    """Draw resident memory over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(minutes, mib, linewidth=0.8)
    axes.set(xlabel="minutes", ylabel="resident memory, MiB", ylim=(0, None))
    figure.savefig(path, dpi=110)


def _against_context(report: Report, results: list[CellResult], path: Path) -> None:
    figure, (rates, sizes) = _figure(2)
    contexts = [result.cell.context for result in results]
    for contestant, colour in _in_lines(report):
        _rates(rates, contestant, colour, results, contexts)
        held = [
            (result.cell.context, entry.cache_bytes)
            for result in results
            for entry in result.entries
            if entry.name == contestant.name
        ]
        if held:
            sizes.plot(*zip(*held, strict=True), color=colour, **_MARKERS)
    for axes, what in (
        (rates, f"tokens/s, {results[0].cell.streams} streams"),
        (sizes, "bytes of a stream"),
    ):
        axes.set_ylabel(what)
        axes.set_xlabel("context")
        axes.set_xticks(contexts, [tokens_label(context) for context in contexts], minor=False)
    _save(figure, rates, path)


def _against_streams(report: Report, results: list[CellResult], path: Path) -> None:
    figure, (axes,) = _figure(1)
    streams = [result.cell.streams for result in results]
    for contestant, colour in _in_lines(report):
        _rates(axes, contestant, colour, results, streams)
    axes.set_ylabel(f"tokens/s at a context of {tokens_label(results[0].cell.context)}")
    axes.set_xlabel("streams")
    axes.set_xticks(streams, [str(count) for count in streams], minor=False)
    _save(figure, axes, path)


def _in_lines(report: Report) -> list[tuple[Contestant, Any]]:
    """Those that are drawn, each in a colour of its own."""
    from matplotlib import colormaps

    drawn = [c for c in report.plan.contestants if c.role != "part"]
    return [(c, colormaps["tab20"](index % 20)) for index, c in enumerate(drawn)]


def _rates(
    axes: Any, contestant: Contestant, colour: Any, results: list[CellResult], where: list[int]
) -> None:
    points: list[tuple[int, Spread]] = []
    for x, result in zip(where, results, strict=True):
        done = any(e.name == contestant.name and e.outcome == OK for e in result.entries)
        rate = tokens_per_s(result.cell, all_rounds(result), contestant.name)
        if done and rate:
            points.append((x, rate))
    if not points:
        return
    middle = [rate.median for _, rate in points]
    low = [rate.median - rate.low for _, rate in points]
    high = [rate.high - rate.median for _, rate in points]
    style = "-" if contestant.role == "ours" else "--"
    axes.errorbar(
        [x for x, _ in points],
        middle,
        yerr=[low, high],
        color=colour,
        linestyle=style,
        capsize=3,
        **_MARKERS,
        label=contestant.title,
    )


def _figure(columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # of the extra `train`

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for each in axes:
        each.set_xscale("log", base=2)
        each.set_yscale("log")
        each.grid(alpha=0.3)
    return figure, list(axes)


def _save(figure: Any, labelled: Any, path: Path) -> None:
    figure.legend(*labelled.get_legend_handles_labels(), loc="outside right center", fontsize=7)
    figure.savefig(path)
