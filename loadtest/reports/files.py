"""Reports as JSON, and records as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from loadtest.measure import Plan
from loadtest.record import Record
from loadtest.reports.objectives import time_per_token_ns
from loadtest.run import Run
from loadtest.sweep import Axis, Point
from loadtest.target import Served

_COLUMNS: Final = (
    "stream_id",
    "due_s",
    "late_s",
    "time_to_first_token_s",
    "time_per_output_token_s",
    "end_to_end_s",
    "queue_s",
    "prompt_tokens",
    "output_tokens",
    "state_bytes",
    "failure",
    "violation",
)


def described(plan: Plan, served: Served) -> dict[str, Any]:
    """The plan as JSON has it, with the model that it met."""
    return asdict(plan) | {
        "model": served.name,
        "fingerprint": served.fingerprint,
        "prompt_tokens": str(plan.prompt_tokens),
        "output_tokens": str(plan.output_tokens),
        "prompts": len(plan.prompts),
        "arrivals": str(plan.arrivals),
        "trace": len(plan.trace),
    }


def as_object(
    plan: Plan, served: Served, axis: Axis | None, points: list[Point], knee: str
) -> dict[str, Any]:
    """What `--json` writes: a plan with its report, or with the points of a sweep."""
    told: dict[str, Any] = {"plan": described(plan, served)}
    if axis is None:
        return told | {"report": asdict(points[0].report)}
    swept = [
        {"value": p.value, "saturated": p.saturated, "report": asdict(p.report)} for p in points
    ]
    return told | {"sweep": {"axis": str(axis), "points": swept, "knee": knee}}


def write_csv(path: Path, axis: Axis | None, runs: Iterable[tuple[float, Run]]) -> None:
    """A row for each request; in a sweep, its first column says at which point."""
    first = [str(axis)] if axis else []
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow([*first, *_COLUMNS])
        for value, run in runs:
            for record in sorted(run.records, key=lambda record: record.due_ns):
                rows.writerow([*([f"{value:g}"] if axis else []), *_row(record, run)])


def _row(record: Record, run: Run) -> list[str]:
    """Seconds from the opening of the window, which the ramp lies before."""
    per_token = time_per_token_ns(record) if record.tokens_ns else None
    first = record.tokens_ns[0] - record.due_ns if record.tokens_ns else None
    return [
        record.stream_id,
        _seconds(record.due_ns - run.window.opens_ns),
        _seconds(record.started_ns - record.due_ns),
        _seconds(first),
        _seconds(per_token),
        _seconds(record.ended_ns - record.due_ns),
        "" if record.queue_s is None else f"{record.queue_s:.6f}",
        str(record.prompt_tokens),
        str(sum(record.counts)),
        "" if record.state_bytes is None else str(record.state_bytes),
        record.failure,
        record.violation,
    ]


def _seconds(time_ns: float | None) -> str:
    return "" if time_ns is None else f"{time_ns / 1e9:.6f}"
