"""The order of windows, and the arithmetic of ratios."""

from __future__ import annotations

import pytest

from loadtest.bench.rounds import (
    Spread,
    fastest,
    halves,
    movements,
    ratio,
    spread,
    step_seconds,
    turns,
)
from tests.loadtest.bench.simulated import Machine, drifting

ROUNDS = [
    {"a": (1.0, 3.0), "b": (2.0, 2.0)},
    {"a": (2.0, 2.0), "b": (8.0, 8.0)},
    {"a": (1.0, 1.0)},
    {"a": (1.0, 1.0), "b": (6.0, 4.0)},
]


def test_a_round_goes_there_and_back() -> None:
    assert turns("abc") == ["a", "b", "c", "c", "b", "a"]


def test_a_ratio_is_the_median_of_those_within_a_round() -> None:
    assert ratio(ROUNDS, "b", "a") == Spread(2.5, 4.0, 4.5, 3)
    assert ratio(ROUNDS, "a", "b") == Spread((1 / 5 + 1 / 4) / 2, 1 / 4, (1 / 4 + 1) / 2, 3)
    assert ratio(ROUNDS, "a", "c") is None


def test_quartiles() -> None:
    assert spread([]) is None
    assert spread([2.0]) == Spread(2.0, 2.0, 2.0, 1)
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0]) == Spread(2.0, 3.0, 4.0, 5)
    assert step_seconds(ROUNDS, "a") == Spread(1.0, 1.0, 2.0, 8)
    assert str(Spread(0.5, 12.345, 1000.0, 3)) == "12.3 (0.5 to 1e+03)"


def test_the_fastest_is_so_within_rounds_whatever_its_own_seconds() -> None:
    rounds = [{"base": (1.0, 1.0), "a": (0.9, 0.9)}, {"base": (4.0, 4.0), "b": (2.0, 2.0)}]
    assert fastest(rounds, ["base", "a", "b"], "base") == "b"
    assert fastest(rounds, ["c"], "base") == "base"


@pytest.mark.parametrize("phase", range(0, 60, 7))
def test_a_machine_that_drifts_by_two_moves_no_ratio(phase: int) -> None:
    costs = {"a": 0.5, "b": 1.5, "c": 0.75}
    machine = Machine(drifting, now=float(phase))
    rounds = []
    for number in range(12):
        windows: dict[str, list[float]] = {}
        for name in turns(list(costs)[:: -1 if number % 2 else 1]):
            machine.sleep(0.05)
            windows.setdefault(name, []).append(machine.work(costs[name]))
        rounds.append({name: (w[0], w[1]) for name, w in windows.items()})
    for over, under in (("b", "a"), ("c", "a"), ("b", "c")):
        found, true = ratio(rounds, over, under), costs[over] / costs[under]
        assert found and found.low * 0.98 < true < found.high * 1.02
        assert found.median == pytest.approx(true, rel=0.05)


def test_one_after_the_other_would_be_wrong_on_that_machine() -> None:
    machine, seconds = Machine(drifting), {}
    for name, cost in (("a", 0.5), ("b", 1.5)):
        seconds[name] = sum(machine.work(cost) for _ in range(24))
    assert seconds["b"] / seconds["a"] != pytest.approx(3.0, rel=0.15)


def test_a_machine_that_stands_still_is_not_complained_about() -> None:
    assert movements([{"a": (1.0, 1.14), "b": (2.0, 2.1)}] * 5) == []
    assert movements([]) == []


def test_two_windows_of_a_round_that_differ_say_that_the_machine_moved() -> None:
    rounds = [{"a": (1.0, 1.2), "b": (1.0, 1.0)}] * 3
    assert halves(rounds, "a") == 1.2 and halves([], "a") == 1.0
    (moved,) = movements(rounds)
    assert moved == "the two windows of a round differ by a factor of 1.20 (a); the limit is 1.15"
    assert halves([{"a": (1.0, 1.3)}, {"a": (1.3, 1.0)}], "a") == 1.3


def test_windows_that_spread_over_the_rounds_say_so_too() -> None:
    rounds = [{"a": (n, n)} for n in (0.001, 0.001, 0.0015, 0.0015)]
    (moved,) = movements(rounds)
    assert moved == "the quartiles of all windows differ by a factor of 1.50 (a); the limit is 1.3"
