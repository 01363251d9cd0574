"""Reports as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loadtest.reports.report import Percentiles, Report
from loadtest.sweep import Axis, Point


def latencies(report: Report) -> Iterator[tuple[str, Percentiles | None]]:
    """The latencies that a reader sees, with their names; not those that never are there."""
    yield "time to first token", report.time_to_first_token_s
    yield "inter-token latency", report.inter_token_latency_s
    yield "time per output token", report.time_per_output_token_s
    yield "end to end", report.end_to_end_s
    for name, times in (
        ("queue, says the server", report.queue_s),
        ("refusal", report.refusal_s),
        ("generator lag", report.lag_s),
        ("sent late", report.late_s),
    ):
        if times is not None:
            yield name, times


def cells(times: Percentiles | None) -> list[str]:
    """p50, p90, p99, p99.9 and the longest, in milliseconds; none for no times."""
    if times is None:
        return []
    shown = (times.p50, times.p90, times.p99, times.p99_9, times.max)
    return [f"{each * 1e3:,.2f}" for each in shown]


def totals(report: Report) -> Iterator[tuple[str, str]]:
    """The other numbers of a report, with their names."""
    yield "tokens/s", f"{report.tokens_per_s:,.1f}"
    yield "of whole streams", f"{report.goodput_tokens_per_s:,.1f} tokens/s"
    yield "requests/s", f"{report.requests_per_s:,.2f}"
    if report.objectives:
        limits = ", ".join(str(each) for each in report.objectives)
        yield (
            "goodput",
            f"{report.met_per_s:,.2f} requests/s; {report.met:,} of {report.requests:,} "
            f"({report.met_share:.1%}) met {limits}",
        )
    yield "duration", f"{report.duration_s:,.1f} s"
    yield (
        "tokens",
        f"{report.output_tokens:,} generated, {report.tokens_per_event:.2f} per event; "
        f"{report.prompt_tokens:,} prompted",
    )
    yield "streams", f"{report.whole:,} whole of {report.requests:,}"
    if report.state_bytes is not None:
        yield "largest state", f"{report.state_bytes:,} bytes, at the end of a stream"
    yield "generator", f"{report.generator_cpu:.0%} of a core"
    if report.resumed:
        yield "resumed", f"{report.resumed:,} times"
    for kind, count in sorted(report.failures.items()):
        yield "failed", f"{count:,} {kind}"
    if report.without_retry_after:
        yield "refused", f"{report.without_retry_after:,} without a time to try again"
    if report.num_violations:
        yield "violations", f"{report.num_violations:,}"
    for violation in report.violations:
        yield "", f"{violation.stream_id or '(not accepted)'}: {violation.what}"


def render(report: Report, title: str) -> RenderableType:
    """The report as a table of latencies in milliseconds above a table of totals."""
    # As Text: what a server writes is no markup.
    times = Table(title=Text(title), title_justify="left")
    times.add_column("ms")
    for column in ("p50", "p90", "p99", "p99.9", "max"):
        times.add_column(column, justify="right")
    for name, found in latencies(report):
        times.add_row(name, *cells(found))
    rest = Table.grid(padding=(0, 2))
    for name, text in totals(report):
        rest.add_row(name, Text(text))
    return Group(times, rest)


SWEEP_COLUMNS = (
    "requests/s",
    "tokens/s",
    "first token p50",
    "p99",
    "per token p50",
    "p99",
    "state",
    "met",
    "failed",
)


def sweep_row(point: Point) -> list[str]:
    """The cells of a point of a sweep, under `SWEEP_COLUMNS`; latencies in milliseconds."""
    report = point.report

    def both(times: Percentiles | None) -> list[str]:
        return [f"{each * 1e3:,.1f}" for each in (times.p50, times.p99)] if times else ["", ""]

    return [
        f"{report.requests_per_s:,.2f}",
        f"{report.tokens_per_s:,.1f}",
        *both(report.time_to_first_token_s),
        *both(report.time_per_output_token_s),
        "" if report.state_bytes is None else f"{report.state_bytes:,}",
        f"{report.met_share:.1%}" if report.objectives else "",
        f"{report.failed + report.num_violations:,}",
    ]


def render_sweep(axis: Axis, points: Sequence[Point], title: str, knee: str) -> RenderableType:
    """A row for each point of a sweep, and where its knee is."""
    table = Table(title=Text(title), title_justify="left")
    table.add_column(str(axis))
    for column in SWEEP_COLUMNS:
        table.add_column(column, justify="right")
    for point in points:
        table.add_row(point.label, *sweep_row(point))
    return Group(table, Text(knee)) if knee else table
