"""The arithmetic of the report, against numbers computed by hand and by NumPy."""

from __future__ import annotations

import io
import json
import random
from dataclasses import asdict

import numpy as np
import pytest
from rich.console import Console

from loadtest.record import CANCELLED, REFUSED, UNFINISHED, Record
from loadtest.reports.objectives import Objective, parse_objectives
from loadtest.reports.report import Percentiles, Report, percentiles, summarise
from loadtest.reports.tables import render
from loadtest.run import Run, Window

MS = 1_000_000
EVERYTHING = Window(0)


def record(
    start: int = 0,
    tokens: tuple[tuple[int, int], ...] = ((100, 1), (110, 1)),
    end: int = 200,
    failure: str = "",
    violation: str = "",
    retry_after_s: float | None = None,
    late: int = 0,
) -> Record:
    """A record in milliseconds; tokens are (when, how many)."""
    return Record(
        stream_id="s",
        due_ns=start * MS,
        started_ns=(start + late) * MS,
        accepted_ns=(start + 1) * MS,
        tokens_ns=tuple(when * MS for when, _ in tokens),
        counts=tuple(count for _, count in tokens),
        ended_ns=end * MS,
        prompt_tokens=10,
        failure=failure,
        retry_after_s=retry_after_s,
        violation=violation,
    )


def report(
    *records: Record,
    lags_ns: tuple[int, ...] = (),
    max_lag_s: float = 1.0,
    window: Window = EVERYTHING,
    objectives: tuple[Objective, ...] = (),
    cpu: float = 0.1,
) -> Report:
    run = Run(records, lags_ns, False, window, cpu)
    return summarise(run, max_lag_s=max_lag_s, objectives=objectives)


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
    for rank, value in ((50, found.p50), (90, found.p90), (99, found.p99), (99.9, found.p99_9)):
        low, high = np.percentile(
            times, [max(0, rank - slack), min(100, rank + slack)], method="inverted_cdf"
        )
        assert low * 0.999 - 1 <= value * 1e9 <= high * 1.001 + 1
    assert found.max == round(max(times)) / 1e9
    assert found.p50 <= found.p90 <= found.p99 <= found.p99_9 <= found.max


def test_percentiles_by_hand() -> None:
    found = percentiles(ms * MS for ms in range(1, 101))
    assert found is not None
    assert (found.p50, found.p90, found.p99) == pytest.approx((0.050, 0.090, 0.099), rel=1e-3)
    assert found == Percentiles(100, found.p50, found.p90, found.p99, 0.1, 0.1)


def test_no_times_have_no_percentiles_and_zero_is_a_time() -> None:
    assert percentiles([]) is None
    assert percentiles([0, 0]) == Percentiles(2, 0, 0, 0, 0, 0)


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
    assert "time to first token 100.00 100.00 100.00 100.00 100.00" in rows
    assert "streams 1 whole of 3" in rows
    assert "failed 1 Overloaded" in rows
    assert "s: [/b] in [::1]" in rows


def test_the_report_is_json() -> None:
    found = json.loads(json.dumps(asdict(report(record()))))
    assert found["time_to_first_token_s"]["max"] == 0.1
    assert found["violations"] == []


def test_a_late_call_is_part_of_every_latency_and_voids_the_run() -> None:
    """The caller waited from when the request was due: what a stalled generator hides otherwise."""
    found = report(*[record(late=90)] * 50, max_lag_s=0.02)
    assert found.time_to_first_token_s is not None and found.late_s is not None
    assert found.time_to_first_token_s.max == 0.1 and found.late_s.p50 == 0.09
    assert found.void
    assert not report(record(late=10), max_lag_s=0.02).void


def test_a_window_has_the_rates_of_its_time_and_the_latencies_of_what_was_due_in_it() -> None:
    ramp = record(start=0, tokens=((100, 1), (1100, 8)), end=1500)
    inside = record(start=1200, tokens=((1300, 1), (1400, 1)), end=1450)
    late_end = record(start=1700, tokens=((1900, 1), (2500, 50)), end=2600)
    found = report(ramp, inside, late_end, window=Window(1000 * MS, 2000 * MS))
    assert found.requests == 2 and found.duration_s == 1.0
    assert found.tokens_per_s == 8 + 1 + 1 + 1  # not the 50 after the end, nor the 1 before
    assert found.requests_per_s == 2  # the ramp's stream ended inside, the last one did not
    assert found.end_to_end_s is not None
    assert found.end_to_end_s.count == 2 and found.end_to_end_s.max == 0.9
    # In the second half one request was due, and one stream of the ramp ended.
    assert found.keeps_up == 1.0


def test_a_server_that_falls_behind_ends_fewer_than_come() -> None:
    records = [record(start=n * 100, end=n * 200 + 200) for n in range(10)]
    found = report(*records, window=Window(0, 1000 * MS))
    assert found.keeps_up == pytest.approx(3 / 5)  # due at 500 to 900; ended at 600, 800, 1000


def test_what_was_cut_has_not_failed() -> None:
    found = report(record(), record(failure=UNFINISHED), record(failure="ServerError INTERNAL"))
    assert found.failures == {UNFINISHED: 1, "ServerError INTERNAL": 1}
    assert found.failed == 1 and found.whole == 1


def test_a_generator_that_uses_a_whole_core_says_so() -> None:
    assert report(record(), cpu=0.95).busy and not report(record(), cpu=0.5).busy


def test_goodput_is_of_requests_that_meet_every_objective() -> None:
    limits = parse_objectives("ttft=150ms,itl=20ms,e2e=1")
    good = record(end=900)
    slow = record(tokens=((160, 1), (170, 1)))
    jerky = record(tokens=((100, 1), (130, 1)))
    long = record(end=1001)
    refused = record(tokens=(), end=3, failure=REFUSED)
    found = report(good, slow, jerky, long, refused, objectives=limits)
    assert (found.met, found.met_share) == (1, 0.2)
    assert found.met_per_s == pytest.approx(1 / 1.001)
    assert report(good, slow).met == 2  # without an objective, all that is whole


@pytest.mark.parametrize("slow_gaps", [1, 2])
def test_one_gap_in_a_hundred_may_be_longer(slow_gaps: int) -> None:
    times = [100 + 10 * n for n in range(101 - slow_gaps)]
    for _ in range(slow_gaps):
        times.append(times[-1] + 500)
    stream = record(tokens=tuple((when, 1) for when in times), end=9000)
    found = report(stream, objectives=parse_objectives("itl=20ms"))
    assert found.met == (slow_gaps == 1)


def test_objectives_are_seconds_or_milliseconds() -> None:
    found = parse_objectives("ttft=500ms,itl=0.05,tpot=30ms,e2e=10s")
    assert [(each.name, each.limit_s) for each in found] == [
        ("ttft", 0.5),
        ("itl", 0.05),
        ("tpot", 0.03),
        ("e2e", 10),
    ]
    assert str(found[0]) == "ttft ≤ 500 ms"
    assert parse_objectives("") == ()


@pytest.mark.parametrize("text", ["ttft", "ttft=", "ttft=0", "ttft=-1", "speed=1", "ttft=1,ttft=2"])
def test_other_objectives_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="is no limit; give each of ttft, itl, tpot, e2e"):
        parse_objectives(text)
