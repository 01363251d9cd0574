"""What becomes of a series: what is printed and written, and the exit code."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Final

import typer

from concertina.cli.output import print_whole
from loadtest.measure import Plan
from loadtest.reports.curves import run_charts, sweep_charts
from loadtest.reports.files import as_object, write_csv
from loadtest.reports.page import page
from loadtest.reports.report import Report
from loadtest.reports.tables import render, render_sweep
from loadtest.sweep import Axis, Series

_FAILED: Final = 1
_VOID: Final = 3
_INTERRUPTED: Final = 130


def publish(
    plan: Plan, series: Series, *, json_file: str, csv_file: Path | None, html_file: Path | None
) -> None:
    """Print a table and write the files. json_file: - prints JSON alone; empty writes none."""
    title, points = _title(plan, series), list(series.points)
    if json_file != "-":
        if series.axis is None:
            print_whole(render(points[0].report, title))
        else:
            print_whole(render_sweep(series.axis, points, title, series.knee))
    told = as_object(plan, series.served, series.axis, points, series.knee)
    if json_file == "-":
        typer.echo(json.dumps(told, indent=2))
    elif json_file:
        Path(json_file).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    if csv_file is not None:
        runs = zip((point.value for point in points), series.runs, strict=True)
        write_csv(csv_file, series.axis, runs)
    if html_file is not None:
        if series.axis is None:
            charts = run_charts(series.runs[0])
        else:
            charts = sweep_charts(series.axis, points, series.served.manifest)
        written = page(
            title,
            charts,
            series.axis,
            points,
            knee=series.knee,
            warnings=[warning for point in points for warning in _warnings(point.report)],
            told=told,
        )
        html_file.write_text(written, encoding="utf-8")


def exit_code(plan: Plan, series: Series, max_lag_s: float) -> int:
    """Explain bad reports on stderr; the worst code of them."""
    reports = [point.report for point in series.points]
    refusals_allowed = plan.is_open or series.axis is Axis.RATE
    failed = sum(
        report.failed - (report.refused - report.without_retry_after) * refusals_allowed
        for report in reports
    )
    violations = sum(report.num_violations for report in reports)
    for report in reports:
        for warning in _warnings(report):
            typer.echo(warning, err=True)
    if any(report.void for report in reports):
        typer.echo(
            f"Run it on a machine with a free core, with fewer streams, or raise --max-lag from "
            f"{max_lag_s * 1e3:.1f} ms.",
            err=True,
        )
    if violations or failed:
        kinds = Counter[str]()
        for report in reports:
            kinds.update(report.failures)
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        told = f" ({counts})" if counts else ""
        typer.echo(
            f"FAILED: {failed} streams failed{told}, {violations} broke the protocol.", err=True
        )
        return _FAILED
    if any(report.void for report in reports):
        return _VOID
    return _INTERRUPTED if any(report.interrupted for report in reports) else 0


def _warnings(report: Report) -> list[str]:
    """Why not to trust a report."""
    found = []
    if report.void:
        worst = max(times.p99 for times in (report.lag_s, report.late_s) if times)
        found.append(
            f"VOID: the load generator itself ran {worst * 1e3:.1f} ms late (p99), so the "
            "latencies mean nothing."
        )
    if report.busy:
        found.append(
            f"The load generator used {report.generator_cpu:.0%} of a core, which is all that it "
            "can use: it may be what is slow, not the server."
        )
    return found


def _title(plan: Plan, series: Series) -> str:
    prompt = f"prompt {plan.prompt_tokens}"
    if plan.prompts:
        prompt = f"{len(plan.prompts)} prompts"
    load = f"{plan.streams} streams"
    if plan.rate is not None:
        load = f"{plan.rate:g} requests/s ({plan.arrivals})"
    parts = [load, prompt, f"output {plan.output_tokens}"]
    if plan.trace:
        parts = [f"a trace of {len(plan.trace)} requests"]
    if series.axis is Axis.CONTEXT:
        parts.remove(prompt)
    elif series.axis is not None:
        parts.remove(load)
    if series.axis is not None:
        parts = [f"{series.axis} swept", *parts]
    return f"{series.served.name} at {plan.address}: {', '.join(parts)}, seed {plan.seed}"
