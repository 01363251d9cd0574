"""Rounds of windows: their order, and what follows from them on a machine whose speed changes.

A round goes A B C C B A. The two windows of each contestant have the same middle in time, so that
a speed that changes evenly over the round is the same for all of them. What is compared is compared
within a round; the median over the rounds is then free of those in which the machine jumped.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Round = Mapping[str, tuple[float, float]]
"""Seconds of a step in the two windows of each contestant that finished the round."""

MOST_BETWEEN_HALVES = 1.15
"""Median factor between the two windows of a round above which the machine moved too much."""
MOST_BETWEEN_QUARTILES = 1.3
"""Factor between the quartiles of a contestant's windows above which it moved too much."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    low: float
    median: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def turns(names: Sequence[str]) -> list[str]:
    """The order of a round's windows: there and back."""
    return [*names, *reversed(names)]


def spread(values: Sequence[float]) -> Spread | None:
    """Median and quartiles of `values`; None without any."""
    if not values:
        return None
    if len(values) == 1:
        return Spread(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low, median, high, len(values))


def ratio(rounds: Sequence[Round], over: str, under: str) -> Spread | None:
    """Seconds of `over` to those of `under`, in each round in which both finished."""
    return spread(
        [sum(each[over]) / sum(each[under]) for each in rounds if over in each and under in each]
    )


def fastest(rounds: Sequence[Round], names: Sequence[str], base: str) -> str:
    """Which of `names` takes the fewest seconds against `base`; `base` where none is compared."""
    shares = {name: found.median for name in names if (found := ratio(rounds, name, base))}
    return min(shares, key=shares.__getitem__, default=base)


def step_seconds(rounds: Sequence[Round], name: str) -> Spread | None:
    """Seconds of a step of one contestant, over all of its windows."""
    return spread([seconds for each in rounds if name in each for seconds in each[name]])


def halves(rounds: Sequence[Round], name: str) -> float:
    """Median over the rounds of the factor between a contestant's two windows; 1 is none."""
    factors = [max(each[name]) / min(each[name]) for each in rounds if name in each]
    return statistics.median(factors) if factors else 1.0


def movements(rounds: Sequence[Round]) -> list[str]:
    """Why the machine moved too much for these rounds; nothing if it stood still enough."""
    names = dict.fromkeys(name for each in rounds for name in each)
    between = {name: halves(rounds, name) for name in names}
    steps = {name: step_seconds(rounds, name) for name in names}
    within = {name: each.high / each.low for name, each in steps.items() if each}
    found = []
    for what, factors, limit in (
        ("the two windows of a round differ", between, MOST_BETWEEN_HALVES),
        ("the quartiles of all windows differ", within, MOST_BETWEEN_QUARTILES),
    ):
        if above := [f"{factors[n]:.2f} ({n})" for n in factors if factors[n] > limit]:
            found.append(f"{what} by a factor of {', '.join(above)}; the limit is {limit}")
    return found
