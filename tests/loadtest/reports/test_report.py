"""The arithmetic of the report, against numbers computed by hand and by NumPy."""

from __future__ import annotations

import io
import json
import random
from dataclasses import asdict

import numpy as np
import pytest
from rich.console import Console

from loadtest.reports.report import Percentiles, Report, percentiles, render, summarise
from loadtest.targets.concertina_api import CANCELLED, REFUSED, Record

MS = 1_000_000


def record(
    start: int = 0,
    tokens: tuple[tuple[int, int], ...] = ((100, 1), (110, 1)),
    end: int = 200,
    failure: str = "",
    violation: str = "",
    retry_after_s: float | None = None,
) -> Record:
    """A record in milliseconds; tokens are (when, how many)."""
    return Record(
        stream_id="s",
        started_ns=start * MS,
        accepted_ns=(start + 1) * MS,
        tokens_ns=tuple(when * MS for when, _ in tokens),
        counts=tuple(count for _, count in tokens),
        ended_ns=end * MS,
        prompt_tokens=10,
        failure=failure,
        retry_after_s=retry_after_s,
        violation=violation,
    )


def report(*records: Record, lags_ns: tuple[int, ...] = (), max_lag_s: float = 1.0) -> Report:
    return summarise(records, lags_ns, max_lag_s=max_lag_s, interrupted=False)


def test_refusals_are_counted_timed_and_no_goodput() -> None:
    timed = record(tokens=(), end=3, failure=REFUSED, retry_after_s=1.0)
    untimed = record(tokens=(), end=9, failure=REFUSED)
    found = report(record(), timed, untimed, record(failure="ServerError INTERNAL"))
    assert (found.refused, found.without_retry_after, found.whole) == (2, 1, 1)
    assert found.refusal_s is not None
    assert (found.refusal_s.count, found.refusal_s.max) == (2, 0.009)
    assert found.goodput_tokens_per_s == pytest.approx(2 / 0.2)
    assert found.tokens_per_s == pytest.approx(4 / 0.2)


@pytest.mark.parametrize("scale", [50, 1e5, 1e9, 1e12])
@pytest.mark.parametrize("count", [1, 10, 101, 20_000])
def test_percentiles_are_those_of_numpy_to_three_digits(count: int, scale: float) -> None:
    rng = random.Random(count)
    times = [rng.lognormvariate(0, 1) * scale for _ in range(count)]
    found = percentiles(times)
    assert found is not None and found.count == count
    # The rank of a percentile among few values is a matter of definition: one rank either way.
    slack = 100 / count
    for rank, value in ((50, found.p50), (90, found.p90), (99, found.p99)):
        low, high = np.percentile(
            times, [max(0, rank - slack), min(100, rank + slack)], method="inverted_cdf"
        )
        assert low * 0.999 - 1 <= value * 1e9 <= high * 1.001 + 1
    assert found.max == round(max(times)) / 1e9
    assert found.p50 <= found.p90 <= found.p99 <= found.max


def test_percentiles_by_hand() -> None:
    found = percentiles(ms * MS for ms in range(1, 101))
    assert found is not None
    assert (found.p50, found.p90, found.p99) == pytest.approx((0.050, 0.090, 0.099), rel=1e-3)
    assert found == Percentiles(100, found.p50, found.p90, found.p99, 0.1)


def test_no_times_have_no_percentiles_and_zero_is_a_time() -> None:
    assert percentiles([]) is None
    assert percentiles([0, 0]) == Percentiles(2, 0, 0, 0, 0)


def test_latencies_and_throughput_by_hand() -> None:
    found = report(
        record(start=1000, tokens=((1100, 2), (1110, 2), (1150, 2)), end=1160),
        record(start=1500, tokens=((1900, 4),), end=3000),
    )
    first, inter = found.time_to_first_token_s, found.inter_token_latency_s
    per_token, whole = found.time_per_output_token_s, found.end_to_end_s
    assert first and inter and per_token and whole
    assert (first.count, first.max) == (2, 0.4)
    assert first.p50 == pytest.approx(0.1, rel=1e-3)
    assert (inter.count, inter.max) == (2, 0.04)  # 10 ms and 40 ms; one event has no gap
    assert inter.p50 == pytest.approx(0.01, rel=1e-3)
    assert (per_token.count, per_token.max) == (1, 0.0125)  # 50 ms for the 4 tokens that follow
    assert (whole.count, whole.max) == (2, 1.5)
    assert found.duration_s == 2.0  # 1000 to 3000
    assert found.output_tokens == 10 and found.prompt_tokens == 20
    assert found.tokens_per_event == 2.5
    assert found.tokens_per_s == 5.0
    assert found.requests_per_s == 1.0


def test_only_whole_streams_have_latencies_but_every_token_counts() -> None:
    found = report(
        record(),
        record(tokens=((5000, 1),), end=9000, failure="ServerError INTERNAL"),
        record(tokens=((7000, 1),), end=8000, violation="gap"),
        record(tokens=(), end=8000, failure="ServerError INTERNAL"),
        record(tokens=(), end=8000, failure=CANCELLED),
    )
    assert found.requests == 5 and found.whole == 1
    assert found.failures == {"ServerError INTERNAL": 2, CANCELLED: 1}
    assert found.time_to_first_token_s is not None
    assert found.time_to_first_token_s.max == 0.1
    assert found.end_to_end_s is not None and found.end_to_end_s.count == 1
    assert found.output_tokens == 4
    assert found.requests_per_s == pytest.approx(1 / 9)


def test_the_first_violations_are_listed_and_all_are_counted() -> None:
    found = report(*(record(violation=f"gap {i}") for i in range(7)))
    assert found.num_violations == 7
    assert [violation.what for violation in found.violations] == [f"gap {i}" for i in range(5)]
    assert found.violations[0].stream_id == "s"


@pytest.mark.parametrize(("late_ms", "void"), [(30, True), (10, False)])
def test_a_generator_that_lags_voids_the_run(late_ms: int, void: bool) -> None:
    lags_ns = (0,) * 95 + (late_ms * MS,) * 5
    found = report(record(), lags_ns=lags_ns, max_lag_s=0.02)
    assert found.void is void
    assert found.lag_s is not None and found.lag_s.max == late_ms / 1e3


def test_rare_lag_does_not_void_the_run() -> None:
    assert not report(record(), lags_ns=(0,) * 999 + (500 * MS,), max_lag_s=0.02).void


def test_an_empty_run_has_a_report() -> None:
    found = report()
    assert (found.requests, found.duration_s, found.tokens_per_s) == (0, 0, 0)
    assert found.time_to_first_token_s is None and not found.void


def test_the_table_shows_the_numbers() -> None:
    found = report(record(), record(failure="Overloaded"), record(violation="[/b] in [::1]"))
    page = io.StringIO()
    Console(width=120, file=page).print(render(found, "[b]demo at [::1]:9000"))
    rows = {" ".join(line.replace("│", " ").split()) for line in page.getvalue().splitlines()}
    assert "[b]demo at [::1]:9000" in rows
    assert "time to first token 100.00 100.00 100.00 100.00" in rows
    assert "streams 1 whole of 3" in rows
    assert "failed 1 Overloaded" in rows
    assert "s: [/b] in [::1]" in rows


def test_the_report_is_json() -> None:
    found = json.loads(json.dumps(asdict(report(record()))))
    assert found["time_to_first_token_s"]["max"] == 0.1
    assert found["violations"] == []
