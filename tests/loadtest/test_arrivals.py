"""When requests come, by the numbers: rates, regularity and the ramp."""

from __future__ import annotations

import random
import statistics
from itertools import islice, pairwise

import pytest

from loadtest.arrivals import POISSON, Arrivals, due_times, parse_arrivals


def draw(arrivals: Arrivals, count: int, ramp_s: float = 0.0, rate: float = 50.0) -> list[float]:
    return list(islice(due_times(rate, arrivals, random.Random(3), ramp_s=ramp_s), count))


@pytest.mark.parametrize("text", ["constant", "poisson", "gamma:0.25", "gamma:4"])
def test_gaps_have_the_rate_and_the_regularity_that_was_asked_for(text: str) -> None:
    arrivals = parse_arrivals(text)
    assert str(arrivals) == text
    gaps = [later - earlier for earlier, later in pairwise([0.0, *draw(arrivals, 20_000)])]
    assert all(gap >= 0 for gap in gaps)
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.05)
    # A gamma distribution's coefficient of variation is one over the root of its shape.
    expected = arrivals.burstiness**-0.5
    assert statistics.pstdev(gaps) * 50 == pytest.approx(expected, rel=0.05, abs=1e-6)


def test_a_clock_ticks_and_the_seed_decides_the_rest() -> None:
    assert draw(parse_arrivals("constant"), 3) == pytest.approx([0.02, 0.04, 0.06])
    assert draw(POISSON, 5) == draw(POISSON, 5)
    others = list(islice(due_times(50.0, POISSON, random.Random(4)), 5))
    assert others != draw(POISSON, 5)


def test_a_ramp_has_half_the_requests_and_then_the_whole_rate() -> None:
    times = draw(parse_arrivals("constant"), 1000, ramp_s=4.0)
    assert times == sorted(times)
    assert sum(time <= 4.0 + 1e-9 for time in times) == pytest.approx(100, abs=1)
    assert sum(time <= 2.0 for time in times) == pytest.approx(25, abs=1)  # a quarter of them
    assert sum(4.0 < time <= 6.0 for time in times) == pytest.approx(100, abs=1)


@pytest.mark.parametrize(
    "text", ["", "often", "gamma", "gamma:", "gamma:0", "gamma:-1", "poisson:2"]
)
def test_other_ways_are_refused_by_name(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"is no way to arrive; give constant, poisson, or gamma:B"
    ):
        parse_arrivals(text)
