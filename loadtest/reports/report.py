"""The report of a run: records in, numbers out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from loadtest.record import CANCELLED, REFUSED, UNFINISHED, Record
from loadtest.reports.objectives import Objective, meets, time_per_token_ns
from loadtest.run import Run

_LISTED_VIOLATIONS: Final = 5
_BUSY: Final = 0.9
_RANKS: Final = (50, 90, 99, 99.9)


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of `count` times, in seconds. A percentile is one of the times."""

    count: int
    p50: float
    p90: float
    p99: float
    p99_9: float
    max: float


@dataclass(frozen=True, slots=True)
class Violation:
    """How one stream breaks the contract of the protocol."""

    stream_id: str
    what: str


@dataclass(frozen=True, slots=True)
class Report:
    """Numbers of one run. Latencies are those of whole streams that were due after the ramp, each
    from when its request was due; None when there are none. Rates are those of the window.

    requests: without those of the ramp.
    failures: streams that were refused, failed, were cancelled or cut, by kind.
    refused: failures for want of room on the server.
    without_retry_after: refused streams whose refusal does not say when to try again.
    resumed: how often a lost stream went on.
    violations: the first few of `num_violations`, which those of the ramp are among.
    duration_s: of the window; without a duration, from the first request to the end of the last.
    output_tokens: every token that arrived, on streams that are not whole, too.
    tokens_per_event: the mean number of tokens that arrive together.
    tokens_per_s: tokens that arrived in the window, on any stream.
    goodput_tokens_per_s: those of whole streams alone.
    requests_per_s: whole streams that ended in the window.
    keeps_up: requests that ended in the second half of the window, over those due in it. Below 1,
        the server falls behind; None if none was due.
    objectives: what a request has to meet, empty for nothing.
    met: requests that meet all of them; `met_share` of all requests, `met_per_s` of the window.
    time_to_first_token_s: to the first token event.
    inter_token_latency_s: between one token event of a stream and the next.
    time_per_output_token_s: per stream, from the first token event to the last, over the tokens
        that came after the first event.
    end_to_end_s: to the end of the stream.
    queue_s: waiting for a slot, as the server says.
    state_bytes: the largest state of a stream at its end, as the server says; None if it does not.
    refusal_s: to the refusal.
    lag_s: how late the event loop of the load generator is.
    late_s: how late requests were sent, which their latencies contain.
    generator_cpu: processor time of the load generator over time; 1 is a whole core, and as much as
        it can use.
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
    keeps_up: float | None
    objectives: tuple[Objective, ...]
    met: int
    met_share: float
    met_per_s: float
    time_to_first_token_s: Percentiles | None
    inter_token_latency_s: Percentiles | None
    time_per_output_token_s: Percentiles | None
    end_to_end_s: Percentiles | None
    queue_s: Percentiles | None
    state_bytes: int | None
    refusal_s: Percentiles | None
    lag_s: Percentiles | None
    late_s: Percentiles | None
    generator_cpu: float
    void: bool
    interrupted: bool

    @property
    def failed(self) -> int:
        """Streams that failed; those that were cancelled or cut did not."""
        return sum(n for kind, n in self.failures.items() if kind not in (CANCELLED, UNFINISHED))

    @property
    def busy(self) -> bool:
        """Whether the load generator may be the bottleneck."""
        return self.generator_cpu > _BUSY


def percentiles(times_ns: Iterable[float]) -> Percentiles | None:
    """Percentiles in seconds of times in nanoseconds; None for no times."""
    values = np.rint([*times_ns])
    if not len(values):
        return None
    found = np.percentile(values, _RANKS, method="inverted_cdf").tolist()
    p50, p90, p99, p99_9, longest = (each / 1e9 for each in (*found, values.max().item()))
    return Percentiles(len(values), p50, p90, p99, p99_9, longest)


def summarise(run: Run, *, max_lag_s: float, objectives: Sequence[Objective] = ()) -> Report:
    """The report of a run.

    It is void if the 99th percentile of how late the generator is, or sends, is above `max_lag_s`.
    """
    counted = [record for record in run.records if record.due_ns >= run.window.opens_ns]
    whole = [record for record in counted if record.whole]
    refused = [record for record in counted if record.failure == REFUSED]
    met = sum(meets(record, objectives) for record in counted)
    violations = [Violation(r.stream_id, r.violation) for r in run.records if r.violation]
    start_ns, end_ns = _window(run, counted)
    duration_s = (end_ns - start_ns) / 1e9
    output_tokens = sum(sum(record.counts) for record in counted)
    events = sum(len(record.counts) for record in counted)
    lag = percentiles(run.lags_ns)
    late = percentiles(record.started_ns - record.due_ns for record in counted)
    ended = sum(record.whole and start_ns <= record.ended_ns <= end_ns for record in run.records)

    def per_s(amount: float) -> float:
        return amount / duration_s if duration_s else 0.0

    return Report(
        requests=len(counted),
        whole=len(whole),
        failures=dict(Counter(record.failure for record in counted if record.failure)),
        refused=len(refused),
        without_retry_after=sum(record.retry_after_s is None for record in refused),
        resumed=sum(record.resumed for record in counted),
        num_violations=len(violations),
        violations=tuple(violations[:_LISTED_VIOLATIONS]),
        duration_s=duration_s,
        prompt_tokens=sum(record.prompt_tokens for record in counted),
        output_tokens=output_tokens,
        tokens_per_event=output_tokens / events if events else 0.0,
        tokens_per_s=per_s(_tokens(run.records, start_ns, end_ns)),
        goodput_tokens_per_s=per_s(
            _tokens([record for record in run.records if record.whole], start_ns, end_ns)
        ),
        requests_per_s=per_s(ended),
        keeps_up=_keeps_up(run.records, (start_ns + end_ns) // 2, end_ns),
        objectives=tuple(objectives),
        met=met,
        met_share=met / len(counted) if counted else 0.0,
        met_per_s=per_s(met),
        time_to_first_token_s=percentiles(r.tokens_ns[0] - r.due_ns for r in whole if r.tokens_ns),
        inter_token_latency_s=percentiles(
            later - earlier for r in whole for earlier, later in pairwise(r.tokens_ns)
        ),
        time_per_output_token_s=percentiles(
            time for r in whole if (time := time_per_token_ns(r)) is not None
        ),
        end_to_end_s=percentiles(r.ended_ns - r.due_ns for r in whole),
        queue_s=percentiles(r.queue_s * 1e9 for r in whole if r.queue_s is not None),
        state_bytes=max((r.state_bytes for r in whole if r.state_bytes is not None), default=None),
        refusal_s=percentiles(r.ended_ns - r.due_ns for r in refused),
        lag_s=lag,
        late_s=late,
        generator_cpu=run.cpu,
        void=any(each is not None and each.p99 > max_lag_s for each in (lag, late)),
        interrupted=run.interrupted,
    )


def _window(run: Run, counted: Sequence[Record]) -> tuple[int, int]:
    """When what counts begins and ends; of a run without a duration, with its records."""
    if run.window.closes_ns is not None and not run.interrupted:
        return run.window.opens_ns, run.window.closes_ns
    if not counted:
        return 0, 0
    return min(record.due_ns for record in counted), max(record.ended_ns for record in counted)


def _tokens(records: Iterable[Record], start_ns: int, end_ns: int) -> int:
    """Tokens that arrived in a time."""
    return sum(
        count
        for record in records
        for when_ns, count in zip(record.tokens_ns, record.counts, strict=True)
        if start_ns <= when_ns <= end_ns
    )


def _keeps_up(records: Iterable[Record], half_ns: int, end_ns: int) -> float | None:
    due = ended = 0
    for record in records:
        due += half_ns <= record.due_ns <= end_ns
        ended += record.whole and half_ns <= record.ended_ns <= end_ns
    return ended / due if due else None
