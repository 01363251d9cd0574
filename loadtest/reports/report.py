"""The report of a run: records in, numbers out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loadtest.targets.concertina_api import REFUSED, Record

_LISTED_VIOLATIONS = 5


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of `count` times, in seconds. A percentile is one of the times."""

    count: int
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True)
class Violation:
    """How one stream breaks the contract of the protocol."""

    stream_id: str
    what: str


@dataclass(frozen=True, slots=True)
class Report:
    """Numbers of one run. Latencies are those of whole streams, None when there are none.

    failures: streams that were refused, failed or were cancelled, by kind.
    refused: failures for want of room on the server.
    without_retry_after: refused streams whose refusal does not say when to try again.
    resumed: how often a lost stream went on.
    violations: the first few of `num_violations`.
    duration_s: from the start of the first request to the end of the last stream.
    output_tokens: every token that arrived, on streams that are not whole, too.
    tokens_per_event: the mean number of tokens that arrive together.
    goodput_tokens_per_s: tokens of whole streams alone.
    refusal_s: from before the call is made to its refusal.
    time_to_first_token_s: from before the call is made to the first token event.
    inter_token_latency_s: between one token event of a stream and the next.
    time_per_output_token_s: per stream, from the first token event to the last, over the tokens
        that came after the first event.
    end_to_end_s: from before the call is made to the end of the stream.
    lag_s: how late the load generator itself is.
    void: whether it is so late that the latencies mean nothing.
    """

    requests: int
    whole: int
    failures: dict[str, int]
    refused: int
    without_retry_after: int
    resumed: int
    num_violations: int
    violations: tuple[Violation, ...]
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    tokens_per_event: float
    tokens_per_s: float
    goodput_tokens_per_s: float
    requests_per_s: float
    time_to_first_token_s: Percentiles | None
    inter_token_latency_s: Percentiles | None
    time_per_output_token_s: Percentiles | None
    end_to_end_s: Percentiles | None
    refusal_s: Percentiles | None
    lag_s: Percentiles | None
    void: bool
    interrupted: bool


def percentiles(times_ns: Iterable[float]) -> Percentiles | None:
    """Percentiles in seconds of times in nanoseconds; None for no times."""
    values = np.rint([*times_ns])
    if not len(values):
        return None
    p50, p90, p99 = np.percentile(values, [50, 90, 99], method="inverted_cdf").tolist()
    return Percentiles(len(values), p50 / 1e9, p90 / 1e9, p99 / 1e9, float(values.max()) / 1e9)


def summarise(
    records: Sequence[Record], lags_ns: Sequence[int], *, max_lag_s: float, interrupted: bool
) -> Report:
    """The report of a run; it is void if the 99th percentile of the lag is above `max_lag_s`."""
    whole = [record for record in records if record.whole]
    refused = [record for record in records if record.failure == REFUSED]
    violations = [
        Violation(record.stream_id, record.violation) for record in records if record.violation
    ]
    duration_s = 0.0
    if records:
        started_ns = min(record.started_ns for record in records)
        duration_s = (max(record.ended_ns for record in records) - started_ns) / 1e9
    output_tokens = sum(sum(record.counts) for record in records)
    events = sum(len(record.counts) for record in records)
    lag = percentiles(lags_ns)
    return Report(
        requests=len(records),
        whole=len(whole),
        failures=dict(Counter(record.failure for record in records if record.failure)),
        refused=len(refused),
        without_retry_after=sum(record.retry_after_s is None for record in refused),
        resumed=sum(record.resumed for record in records),
        num_violations=len(violations),
        violations=tuple(violations[:_LISTED_VIOLATIONS]),
        duration_s=duration_s,
        prompt_tokens=sum(record.prompt_tokens for record in records),
        output_tokens=output_tokens,
        tokens_per_event=output_tokens / events if events else 0.0,
        tokens_per_s=output_tokens / duration_s if duration_s else 0.0,
        goodput_tokens_per_s=(
            sum(sum(record.counts) for record in whole) / duration_s if duration_s else 0.0
        ),
        requests_per_s=len(whole) / duration_s if duration_s else 0.0,
        time_to_first_token_s=percentiles(r.tokens_ns[0] - r.started_ns for r in whole),
        inter_token_latency_s=percentiles(
            later - earlier for r in whole for earlier, later in pairwise(r.tokens_ns)
        ),
        time_per_output_token_s=percentiles(
            (r.tokens_ns[-1] - r.tokens_ns[0]) / sum(r.counts[1:]) for r in whole if r.counts[1:]
        ),
        end_to_end_s=percentiles(r.ended_ns - r.started_ns for r in whole),
        refusal_s=percentiles(r.ended_ns - r.started_ns for r in refused),
        lag_s=lag,
        void=lag is not None and lag.p99 > max_lag_s,
        interrupted=interrupted,
    )


def render(report: Report, title: str) -> RenderableType:
    """The report as a table of latencies in milliseconds above a table of totals."""
    # As Text: what a server writes is no markup.
    latencies = Table(title=Text(title), title_justify="left")
    latencies.add_column("ms")
    for column in ("p50", "p90", "p99", "max"):
        latencies.add_column(column, justify="right")
    for name, times in (
        ("time to first token", report.time_to_first_token_s),
        ("inter-token latency", report.inter_token_latency_s),
        ("time per output token", report.time_per_output_token_s),
        ("end to end", report.end_to_end_s),
        ("refusal", report.refusal_s),
        ("generator lag", report.lag_s),
    ):
        cells = (times.p50, times.p90, times.p99, times.max) if times else ()
        latencies.add_row(name, *(f"{cell * 1e3:,.2f}" for cell in cells))

    totals = Table.grid(padding=(0, 2))
    totals.add_row("tokens/s", f"{report.tokens_per_s:,.1f}")
    totals.add_row("of whole streams", f"{report.goodput_tokens_per_s:,.1f} tokens/s")
    totals.add_row("requests/s", f"{report.requests_per_s:,.2f}")
    totals.add_row("duration", f"{report.duration_s:,.1f} s")
    totals.add_row(
        "tokens",
        f"{report.output_tokens:,} generated, {report.tokens_per_event:.2f} per event; "
        f"{report.prompt_tokens:,} prompted",
    )
    totals.add_row("streams", f"{report.whole:,} whole of {report.requests:,}")
    if report.resumed:
        totals.add_row("resumed", f"{report.resumed:,} times")
    for kind, count in sorted(report.failures.items()):
        totals.add_row("failed", Text(f"{count:,} {kind}"))
    if report.without_retry_after:
        totals.add_row("refused", f"{report.without_retry_after:,} without a time to try again")
    if report.num_violations:
        totals.add_row("violations", f"{report.num_violations:,}")
    for violation in report.violations:
        totals.add_row("", Text(f"{violation.stream_id or '(not accepted)'}: {violation.what}"))
    return Group(latencies, totals)
