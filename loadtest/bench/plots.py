"""Two pictures of a run of the bench, and one of a server's memory over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from loadtest.bench.plan import tokens_label
from loadtest.bench.run import Report, Result
from loadtest.bench.worker import OK

AGAINST_CONTEXT, AGAINST_STREAMS = "bench-context.svg", "bench-streams.svg"
_SIZE = (11, 4)

Floats = npt.NDArray[np.float64]


def plot(report: Report, folder: Path) -> list[Path]:
    """Write the pictures of `report` into `folder`, which is made; those with two points or more.

    Tokens/s and bytes of a stream against context, tokens/s of all streams against their number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contexts = sorted({cell.context for cell in report.plan.cells})
    streams = sorted({cell.streams for cell in report.plan.cells})
    written = []
    if len(contexts) > 1:
        count = streams[len(streams) // 2]
        written.append(folder / AGAINST_CONTEXT)
        _against_context(report, contexts, count, written[-1])
    if len(streams) > 1:
        written.append(folder / AGAINST_STREAMS)
        _against_streams(report, contexts[-1], streams, written[-1])
    return written


def plot_memory(path: Path, minutes: Floats, mib: Floats) -> None:
    """Draw resident memory over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 2.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(minutes, mib, linewidth=0.8)
    axes.set(xlabel="minutes", ylabel="resident memory, MiB", ylim=(0, None))
    figure.savefig(path, dpi=110)


def _against_context(report: Report, contexts: list[int], streams: int, path: Path) -> None:
    figure, (rates, sizes) = _figure(2)
    for name, title, results in _lines(report):
        here = [r for r in results if r.streams == streams]
        _line(rates, title, [(r.context, r.tokens_per_s) for r in here if r.outcome == OK])
        if name not in ("fixed-steps", "fixed-256"):
            _line(sizes, title, [(r.context, float(r.cache_bytes)) for r in here])
    for axes, what in ((rates, f"tokens/s, {streams} streams"), (sizes, "bytes of a stream")):
        axes.set_ylabel(what)
        axes.set_xlabel("context")
        axes.set_xticks(contexts, [tokens_label(context) for context in contexts], minor=False)
    _save(figure, rates, path)


def _against_streams(report: Report, context: int, streams: list[int], path: Path) -> None:
    figure, (axes,) = _figure(1)
    for _, title, results in _lines(report):
        here = [r for r in results if r.context == context and r.outcome == OK]
        _line(axes, title, [(r.streams, r.tokens_per_s) for r in here])
    axes.set_ylabel(f"tokens/s at a context of {tokens_label(context)}")
    axes.set_xlabel("streams")
    axes.set_xticks(streams, [str(count) for count in streams], minor=False)
    _save(figure, axes, path)


def _lines(report: Report) -> list[tuple[str, str, list[Result]]]:
    return [
        (c.name, c.title, [r for r in report.results if r.contestant == c.name])
        for c in report.plan.contestants
    ]


def _figure(columns: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # of the extra `train`

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for each in axes:
        each.set_xscale("log", base=2)
        each.set_yscale("log")
        each.grid(alpha=0.3)
    return figure, list(axes)


def _line(axes: Any, title: str, points: list[tuple[int, float | None]]) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), marker="o", label=title)


def _save(figure: Any, labelled: Any, path: Path) -> None:
    figure.legend(*labelled.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path)
