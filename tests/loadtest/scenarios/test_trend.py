"""The verdict on memory that grows, and on memory that does not."""

from __future__ import annotations

import numpy as np
import pytest

from loadtest.scenarios.trend import Slope, grows, theil_sen

MINUTES = np.linspace(0, 60, 400)


def _noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 500, len(MINUTES))


@pytest.mark.parametrize("slope", [-50.0, 0.0, 200.0])
def test_the_slope_is_found_in_noise_and_among_outliers(slope: float) -> None:
    for seed in range(20):
        memory = 160_000 + slope * MINUTES + _noise(seed)
        memory[:: 17 + seed] += 40_000  # a tenth of it, or less, is far off
        fitted = theil_sen(MINUTES, memory)
        assert fitted.low <= fitted.fitted <= fitted.high
        assert abs(fitted.fitted - slope) < 15
        assert fitted.high - fitted.low < 30


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    fits = [theil_sen(MINUTES, 100 * MINUTES + _noise(seed)) for seed in range(200)]
    assert 180 <= sum(fit.low <= 100 <= fit.high for fit in fits) <= 199


def test_only_what_is_both_much_and_certain_is_growth() -> None:
    assert grows(Slope(200, 150, 250), minutes=45, allowed=4)
    assert not grows(Slope(200, -10, 400), minutes=45, allowed=4)
    assert not grows(Slope(30, 20, 40), minutes=45, allowed=4)


def test_memory_that_never_changes_has_no_slope() -> None:
    assert theil_sen(MINUTES, np.full(len(MINUTES), 7.0)) == Slope(0, 0, 0)
