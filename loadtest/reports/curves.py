"""The charts of a run and of a sweep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from concertina.bundle.resources import entry_bytes, peak_state_bytes
from concertina.v1 import bundle_pb2
from loadtest.reports.chart import Chart, Line
from loadtest.reports.report import Percentiles
from loadtest.run import Run
from loadtest.sweep import Axis, Point

_SHARES: Final = tuple(np.linspace(0, 100, 101).tolist())
_MOST_BINS: Final = 120


def sweep_charts(
    axis: Axis, points: Sequence[Point], manifest: bundle_pb2.Manifest | None
) -> list[Chart]:
    """The charts of a sweep. manifest: of the model, if it is known."""
    if axis is Axis.CONTEXT:
        return [_state(points, manifest), *_speeds(points), _first_token(axis, points)]
    return [_throughput(axis, points), _first_token(axis, points), _per_token(axis, points)]


def _state(points: Sequence[Point], manifest: bundle_pb2.Manifest | None) -> Chart:
    """What streams held at their ends, the most on the way there, and what would never fold.

    A stream holds least right after a fold, and many contexts end there: hence the most.
    """
    lines = [
        Line(
            "at its end", [(p.value, p.report.state_bytes) for p in points if p.report.state_bytes]
        )
    ]
    if manifest is not None and lines[0].points:
        contexts = [int(point.value) for point in points]
        unfolded = sum(entry_bytes(manifest).values())
        for name, known in (
            ("most on the way", [(c, peak_state_bytes(manifest, c)) for c in contexts]),
            ("without folding", [(c, unfolded * c) for c in contexts]),
        ):
            lines.append(Line(name, known, dashed=True))
    return Chart(
        "State of a stream, bytes",
        "context, tokens",
        lines,
        log_x=True,
        log_y=True,
        binary_x=True,
        binary_y=True,
    )


def _speeds(points: Sequence[Point]) -> list[Chart]:
    """Of one stream after its first token, and of all of them with their prompts."""
    one = [
        (p.value, 1 / times.p50)
        for p in points
        if (times := p.report.time_per_output_token_s) and times.p50
    ]
    every = [(p.value, p.report.tokens_per_s) for p in points]
    return [
        Chart(title, "context, tokens", [Line(name, found)], log_x=True, binary_x=True)
        for title, name, found in (
            ("Tokens/s of a stream, once it writes", "median", one),
            ("Tokens/s of all streams, prompts in between", "all streams", every),
        )
    ]


def _throughput(axis: Axis, points: Sequence[Point]) -> Chart:
    lines = [
        Line("whole streams", [(p.value, p.report.goodput_tokens_per_s) for p in points]),
    ]
    if any(p.report.objectives for p in points):
        met = [(p.value, p.report.goodput_tokens_per_s * p.report.met_share) for p in points]
        lines.append(Line("that met the objectives", met))
    return Chart("Tokens/s", _unit(axis), lines, log_x=True, binary_x=True)


def _first_token(axis: Axis, points: Sequence[Point]) -> Chart:
    return _latency("Time to first token, ms", axis, points, "time_to_first_token_s")


def _per_token(axis: Axis, points: Sequence[Point]) -> Chart:
    return _latency("Time per output token, ms", axis, points, "time_per_output_token_s")


def _latency(title: str, axis: Axis, points: Sequence[Point], name: str) -> Chart:
    found: list[tuple[float, Percentiles]] = [
        (p.value, times) for p in points if (times := getattr(p.report, name)) is not None
    ]
    lines = [
        Line("p50", [(x, times.p50 * 1e3) for x, times in found]),
        Line("p90", [(x, times.p90 * 1e3) for x, times in found]),
        Line("p99", [(x, times.p99 * 1e3) for x, times in found]),
    ]
    return Chart(title, _unit(axis), lines, log_x=True, log_y=True, binary_x=True)


def _unit(axis: Axis) -> str:
    return {
        Axis.CONTEXT: "context, tokens",
        Axis.CONCURRENCY: "streams at once",
        Axis.RATE: "requests/s",
    }[axis]


def run_charts(run: Run) -> list[Chart]:
    """How latencies are distributed, and what happened when."""
    whole = [r for r in run.records if r.whole and r.due_ns >= run.window.opens_ns]
    first = [r.tokens_ns[0] - r.due_ns for r in whole if r.tokens_ns]
    gaps = [later - earlier for r in whole for earlier, later in pairwise(r.tokens_ns)]
    ends = [r.ended_ns - r.due_ns for r in whole]
    lines = [
        Line("time to first token", _shares(first)),
        Line("inter-token latency", _shares(gaps)),
        Line("end to end", _shares(ends)),
    ]
    spread = Chart("Share of latencies below, %", "ms", lines, log_x=True)
    return [spread, *_over_time(run)]


def _shares(times_ns: Sequence[int]) -> list[tuple[float, float]]:
    if not times_ns:
        return []
    found = np.percentile(times_ns, _SHARES) / 1e6
    return _pairs(found.tolist(), np.array(_SHARES))


def _pairs(across: Sequence[float], up: npt.NDArray[Any]) -> list[tuple[float, float]]:
    return list(zip(across, up.tolist(), strict=True))


def _over_time(run: Run) -> list[Chart]:
    """Tokens/s and running streams over the seconds of a run."""
    if not run.records:
        return []
    began = min(record.due_ns for record in run.records)
    lasted_s = max(0.1, (max(record.ended_ns for record in run.records) - began) / 1e9)
    bins = max(1, min(_MOST_BINS, round(lasted_s)))
    edges = np.linspace(0, lasted_s, bins + 1)
    middles = ((edges[:-1] + edges[1:]) / 2).tolist()

    def seconds(times_ns: Iterable[int]) -> list[float]:
        return [(time_ns - began) / 1e9 for time_ns in times_ns]

    when = seconds(time for record in run.records for time in record.tokens_ns)
    counts = [count for record in run.records for count in record.counts]
    rates = np.histogram(when, edges, weights=counts)[0] / (edges[1] - edges[0])
    started = np.sort(seconds(record.started_ns for record in run.records))
    ended = np.sort(seconds(record.ended_ns for record in run.records))
    running = np.searchsorted(started, middles) - np.searchsorted(ended, middles)
    return [
        Chart("Tokens/s", "seconds", [Line("all streams", _pairs(middles, rates))]),
        Chart("Streams", "seconds", [Line("running", _pairs(middles, running))]),
    ]
