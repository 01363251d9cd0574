"""The definition of sampling: draws from whole rows, vectorised over the batch.

Rows of a large vocabulary come here only where rounding decides (`long_rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from server.arrays import Bools, Doubles, Floats, Ints
from server.request import SamplingParameters


@dataclass(frozen=True)
class Filters:
    """What decides which tokens the rows of a batch may draw, one array `[B]` for each."""

    temperature: Doubles
    top_k: Ints
    top_p: Doubles
    min_p: Doubles
    typical_p: Doubles

    @staticmethod
    def of(parameters: Sequence[SamplingParameters]) -> Filters:
        """The filters of rows with `parameters`."""
        return Filters(
            np.array([p.temperature for p in parameters], np.float64),
            np.array([p.top_k for p in parameters], np.int64),
            np.array([p.top_p for p in parameters], np.float64),
            np.array([p.min_p for p in parameters], np.float64),
            np.array([p.typical_p for p in parameters], np.float64),
        )

    @cached_property
    def greedy(self) -> Ints:
        """Rows that take the most likely token."""
        return np.flatnonzero(self.temperature == 0)

    @cached_property
    def divisors(self) -> Doubles | None:
        """Divisors of the logits, `[B, 1]`; None if all are 1."""
        divisors = np.where(self.temperature == 0, 1.0, self.temperature)[:, None]
        return None if (divisors == 1).all() else divisors

    @cached_property
    def limited(self) -> Ints:
        """Rows with a top_k or a top_p."""
        return np.flatnonzero((self.top_k > 0) | (self.top_p < 1))

    @cached_property
    def floored(self) -> bool:
        """Whether any row has a min_p."""
        return bool(self.min_p.any())

    @cached_property
    def typical(self) -> Ints:
        """Rows with a typical_p."""
        return np.flatnonzero(self.typical_p < 1)


def draw(logits: Floats | Doubles, filters: Filters, numbers: Doubles) -> Ints:
    """The token on which each of `numbers[B]` falls, in `logits[B, vocabulary]`, `[B]`."""
    greedy = filters.greedy
    weights = _exponentials(logits, filters.divisors)
    _keep(weights, filters.limited, _likeliest, filters.top_k, filters.top_p)
    if filters.floored:
        weights[weights < filters.min_p[:, None]] = 0  # the most likely token has weight 1
    _keep(weights, filters.typical, _typical, filters.typical_p)
    cumulated = weights.cumsum(axis=1)
    drawn = numbers * cumulated[:, -1]
    picked: Ints = (cumulated > drawn[:, None]).argmax(axis=1)
    if len(greedy):
        picked[greedy] = logits[greedy].argmax(axis=1)
    return picked


def _exponentials(logits: Floats | Doubles, divisors: Doubles | None) -> Doubles:
    """Probabilities, scaled so that the most likely token of each row has 1."""
    weights: Doubles = logits.astype(np.float64)
    if divisors is not None:
        weights /= divisors
    with np.errstate(invalid="ignore"):  # `failures` reports rows that are not finite
        weights -= weights.max(axis=1, keepdims=True)
    return np.exp(weights, out=weights)


def _keep(
    weights: Doubles, rows: Ints, kept: Callable[..., Bools], *columns: Ints | Doubles
) -> None:
    """Set to 0, in `rows[R]`, the weights for which `kept(weights, *columns)` is false."""
    if len(rows):
        ours = weights[rows]
        weights[rows] = np.where(kept(ours, *(column[rows] for column in columns)), ours, 0)


def _likeliest(weights: Doubles, top_k: Ints, top_p: Doubles) -> Bools:
    """Which tokens each row keeps after its top_k, then its top_p, `[B, vocabulary]`."""
    return weights >= floors(weights, top_k, top_p)[:, None]


def floors(weights: Doubles, top_k: Ints, top_p: Doubles) -> Doubles:
    """Smallest weight that each row keeps after its top_k, then its top_p, `[B]`."""
    size = weights.shape[1]
    kept = np.where((top_k > 0) & (top_k < size), top_k, size)
    most = int(kept.max())
    falling = -np.sort(np.partition(-weights, most - 1)[:, :most])  # sorts no more than needed
    floor = falling[np.arange(len(kept)), kept - 1]
    whole = np.where(weights >= floor[:, None], weights, 0).sum(axis=1)
    reached = falling.cumsum(axis=1) / whole[:, None]
    # After `kept` there are only ties with the floor.
    needed = np.minimum((reached < top_p[:, None]).sum(axis=1), kept - 1)
    nucleus = falling[np.arange(len(kept)), needed]
    both: Doubles = np.where(top_p < 1, nucleus, floor)
    return both


def _typical(weights: Doubles, typical_p: Doubles) -> Bools:
    """Which tokens each row keeps after its typical_p, `[B, vocabulary]`."""
    with np.errstate(invalid="ignore"):  # a row without any token left
        share = weights / weights.sum(axis=1, keepdims=True)
    surprise = -np.log(share, out=np.full_like(share, -np.inf), where=share > 0)
    entropy = np.multiply(share, surprise, out=np.zeros_like(share), where=share > 0).sum(axis=1)
    distance = np.abs(surprise - entropy[:, None])
    order = distance.argsort(axis=1, kind="stable")
    reached = np.take_along_axis(share, order, axis=1).cumsum(axis=1)
    needed = (reached < typical_p[:, None]).sum(axis=1, keepdims=True)
    last = np.take_along_axis(order, needed.clip(max=weights.shape[1] - 1), axis=1)
    closest: Bools = distance <= np.take_along_axis(distance, last, axis=1)
    return closest
