"""Whether a series of samples grows, robust against outliers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_MOST_SAMPLES = 2_000  # the fit looks at every pair
_Z95 = 1.96


@dataclass(frozen=True)
class Slope:
    """KiB a minute: the fit, and its 95% interval."""

    fitted: float
    low: float
    high: float


def grows(slope: Slope, minutes: float, allowed: float) -> bool:
    """Whether memory grows: by more than `allowed` MiB, and beyond what chance explains."""
    return slope.fitted * minutes > 1024 * allowed and slope.low > 0


def theil_sen(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> Slope:
    """The median slope between all pairs of points, and its 95% interval (Sen 1968)."""
    step = -(-len(x) // _MOST_SAMPLES)
    x, y = x[::step], y[::step]
    later, earlier = np.tril_indices(len(x), -1)
    slopes = np.sort((y[later] - y[earlier]) / (x[later] - x[earlier]))
    n = len(x)
    _, ties = np.unique(y, return_counts=True)
    spread = n * (n - 1) * (2 * n + 5) - int((ties * (ties - 1) * (2 * ties + 5)).sum())
    margin = _Z95 * (spread / 18) ** 0.5
    low = int(max(0, round((len(slopes) - margin) / 2)))
    high = int(min(len(slopes) - 1, round((len(slopes) + margin) / 2)))
    return Slope(float(np.median(slopes)), float(slopes[low]), float(slopes[high]))
