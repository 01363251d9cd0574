"""Draws from one row of a large vocabulary, without looking closely at the tokens that cannot be.

Gives the tokens of `whole_rows`. What is kept is weighed as there, bit by bit. Sums over a whole
row are only estimated, with a limit to their error: where that leaves a doubt, the next better
estimate decides, and in the end `whole_rows` itself.

Shapes: `V` vocabulary, `C` candidates. An exponent is a logit divided by the temperature, less that
of the most likely token; its exponential is the token's weight.
"""

from __future__ import annotations

import math

import numpy as np

from server.arrays import Bools, Doubles, Floats, Ints
from server.engine.sampling import whole_rows
from server.engine.sampling.estimates import (
    SUMMED,
    Estimate,
    Estimator,
    Limits,
    RoundingDecides,
    Scratch,
    closely,
    exponents_of,
    mean_of,
    roughly,
    rounding,
)
from server.request import SamplingParameters

LONG_ROW = 4096
"""Smallest vocabulary whose rows are drawn one by one. Smaller ones are faster all at once."""

_BLOCK = 64  # tokens whose maximum is taken at once
_CLOSE = 1e-9  # exponents that differ by less may change places by rounding


def draw(
    row: Floats | Doubles, parameters: SamplingParameters, number: float, scratch: Scratch
) -> int:
    """The token on which `number` falls, in the logits `row[V]`."""
    if parameters.temperature == 0:
        return int(row.argmax())
    best = float(row.max())
    if not math.isfinite(best):
        return 0  # any: `failures` reports the row
    for estimate in (roughly, closely):
        try:
            return _draw(row, best, parameters, number, scratch, estimate)
        except RoundingDecides:
            continue
    filters, numbers = whole_rows.Filters.of([parameters]), np.array([number])
    return int(whole_rows.draw(row[None], filters, numbers)[0])


def likeliest(row: Floats | Doubles, count: int) -> float:
    """A logit that at least `count` tokens of `row[V]` reach, and few more."""
    size = len(row) // _BLOCK
    if 4 * count > size:
        return float(np.partition(row, len(row) - count)[len(row) - count])
    # The maxima of blocks are those of as many tokens. Blocks of every `size`th token are faster.
    maxima = row[: size * _BLOCK].reshape(_BLOCK, size).max(axis=0)
    return float(np.partition(maxima, size - count)[size - count])


def reaching(row: Floats | Doubles, bound: float, slack: float = 0.0) -> Ints:
    """Ids of the tokens of `row[V]` whose logit is at least `bound`, or as good as."""
    bound -= slack + 1e-14 * abs(bound)
    if bound < -3e38:  # a float32 does not reach as far
        bound = -math.inf
    # Rounded to the logits' type, it is at most the next of them.
    return np.flatnonzero(row >= row.dtype.type(bound))


def _draw(
    row: Floats | Doubles,
    best: float,
    parameters: SamplingParameters,
    number: float,
    scratch: Scratch,
    estimate: Estimator,
) -> int:
    temperature, typical_p = parameters.temperature, parameters.typical_p
    if 0 < parameters.top_k < len(row):
        ids, weights = _top_k(row, best, parameters)
    elif parameters.top_p < 1:
        sums = estimate(row, best, temperature, scratch)
        ids, weights = _top_p(row, best, parameters, sums)
    elif parameters.min_p:
        bound = best + temperature * math.log(parameters.min_p)
        ids, weights = _candidates(row, best, temperature, bound)
    elif typical_p < 1:
        ids, weights = _typical(row, best, parameters, scratch, estimate)
        typical_p = 1.0
    else:
        sums = estimate(row, best, temperature, scratch)
        return _locate(row, best, temperature, number, sums)
    if parameters.min_p:
        ids, weights = _where(weights >= parameters.min_p, ids, weights)
    if typical_p < 1:
        chosen = _typical_of(exponents_of(row[ids], best, temperature), weights, typical_p)
        ids, weights = ids[chosen], weights[chosen]
    cumulated = weights.cumsum()
    drawn = number * cumulated[-1]
    return int(ids[np.searchsorted(cumulated, drawn, side="right")])


# ---- candidates, weighed as in `whole_rows`


def _candidates(
    row: Floats | Doubles, best: float, temperature: float, bound: float
) -> tuple[Ints, Doubles]:
    """Ids and weights of the tokens whose logit is at least `bound`, `[C]` each.

    Some that are a little less likely are among them, since weights are rounded, too.
    """
    ids = reaching(row, bound, 1e-12 * temperature + 1e-14 * abs(best))
    return ids, np.exp(exponents_of(row[ids], best, temperature))


def _where(kept: Bools, ids: Ints, weights: Doubles) -> tuple[Ints, Doubles]:
    return (ids, weights) if kept.all() else (ids[kept], weights[kept])


def _top_k(
    row: Floats | Doubles, best: float, parameters: SamplingParameters
) -> tuple[Ints, Doubles]:
    """Ids and weights of the tokens that are left after a top_k and a top_p."""
    count = parameters.top_k
    ids, weights = _candidates(row, best, parameters.temperature, likeliest(row, count))
    floor = np.partition(weights, len(weights) - count)[len(weights) - count]
    ids, weights = _where(weights >= floor, ids, weights)
    if parameters.top_p == 1:
        return ids, weights
    falling = np.sort(weights)[::-1]
    whole = float(weights.sum())
    enough = Limits.around(parameters.top_p * whole, rounding(len(ids)) * whole)
    return _where(weights >= _floor(falling, falling.cumsum(), enough), ids, weights)


def _top_p(
    row: Floats | Doubles, best: float, parameters: SamplingParameters, sums: Estimate
) -> tuple[Ints, Doubles]:
    """Ids and weights of the tokens that are left after a top_p, and some that min_p drops."""
    temperature, top_p, min_p = parameters.temperature, parameters.top_p, parameters.min_p
    enough = Limits.around(top_p * sums.whole, sums.error)
    for part in (0.5, 0.02, 0.0):  # of what may be missing
        if min_p:
            bound = best + temperature * math.log(min_p)
        else:
            bound = _without(row, best, temperature, part * (1 - top_p) * sums.whole)
        ids, weights = _candidates(row, best, temperature, bound)
        if sums.error * len(ids) > 0.1 * sums.whole:
            raise RoundingDecides  # most likely, and it takes long to order so many
        falling = np.sort(weights)[::-1]
        reached = falling.cumsum()
        if reached[-1] >= enough.most:
            break
        if min_p and reached[-1] < enough.least:
            return ids, weights
    return _where(weights >= _floor(falling, reached, enough), ids, weights)


def _without(row: Floats | Doubles, best: float, temperature: float, mass: float) -> float:
    """A logit so that the tokens below it have about the `mass`, by a sample; maybe -inf."""
    rising = row[::SUMMED].copy()
    rising.sort()
    below = SUMMED * np.exp(exponents_of(rising, best, temperature)).cumsum()
    index = int(np.searchsorted(below, mass, side="right"))
    return float(rising[index - 1]) if mass and index else -math.inf


def _floor(falling: Doubles, reached: Doubles, enough: Limits) -> float:
    """The first of the `falling` weights with which the sum is enough."""
    first, last = np.searchsorted(reached, (enough.least, enough.most))
    if last == len(falling) or falling[first] != falling[last]:
        raise RoundingDecides
    return float(falling[first])


def _typical(
    row: Floats | Doubles,
    best: float,
    parameters: SamplingParameters,
    scratch: Scratch,
    estimate: Estimator,
) -> tuple[Ints, Doubles]:
    """Ids and weights of the tokens that are left after a typical_p, if nothing else drops any."""
    temperature, size = parameters.temperature, len(row)
    nearness: Floats | Doubles = scratch.exponents
    weights: Floats | Doubles = scratch.weights
    if estimate is roughly:
        nearness, weights = nearness.view(np.float32)[:size], scratch.floats
    sums = estimate(row, best, temperature, scratch, nearness)
    mean = mean_of(nearness, weights, sums.whole)
    nearness -= nearness.dtype.type(mean)
    np.negative(np.abs(nearness, out=nearness), out=nearness)
    close = max(_CLOSE, 4 * sums.error / sums.whole * (1 + math.log(size)))
    enough = Limits.around(parameters.typical_p * sums.whole, sums.error)
    for count in (512, size // 8, size):
        bound = -math.inf if 4 * count > size else likeliest(nearness, count)
        near = np.flatnonzero(nearness >= bound)
        if sums.error * len(near) > 0.1 * sums.whole:
            raise RoundingDecides
        exponents = exponents_of(row[near], best, temperature)
        ours = np.exp(exponents)
        chosen = _nearest(exponents, ours, mean, enough, close, bound)
        if chosen is not None:
            return near[chosen], ours[chosen]
    raise RoundingDecides


def _typical_of(exponents: Doubles, weights: Doubles, typical_p: float) -> Ints:
    """Indices of those of few tokens that are left after a typical_p."""
    whole = float(weights.sum())
    mean = mean_of(exponents, weights, whole)
    enough = Limits.around(typical_p * whole, rounding(len(weights)) * whole)
    chosen = _nearest(exponents, weights, mean, enough, _CLOSE, -math.inf)
    if chosen is None:
        raise RoundingDecides
    return chosen


def _nearest(
    exponents: Doubles, weights: Doubles, mean: float, enough: Limits, close: float, bound: float
) -> Ints | None:
    """Indices of the exponents next to the `mean` whose weights are enough; None if all are not.

    The surprise of a token is above the entropy as far as its exponent is below the mean. There may
    be more tokens whose nearness is below `bound`.
    """
    nearness = -np.abs(exponents - mean)
    order = np.argsort(nearness)[::-1]
    index = int(np.searchsorted(weights[order].cumsum(), (enough.least + enough.most) / 2))
    if index == len(order) or nearness[order[index]] - 2 * close < bound:
        return None
    edge = nearness[order[index]]
    chosen, inner = np.flatnonzero(nearness >= edge - close), nearness > edge + close
    outermost = weights[chosen][~inner[chosen]]
    reached = weights[inner].sum(), weights[chosen].sum()
    if (outermost != outermost[0]).any() or reached[0] >= enough.least or reached[1] < enough.most:
        raise RoundingDecides
    return chosen


def _locate(
    row: Floats | Doubles, best: float, temperature: float, number: float, sums: Estimate
) -> int:
    """The token on which `number` falls, if all tokens may be drawn."""
    drawn = Limits.around(number * sums.whole, 2 * sums.error)
    block = max(0, int(np.searchsorted(sums.upto, number * sums.whole, side="right")) - 1)
    begin = block * SUMMED
    weights = np.exp(exponents_of(row[begin : begin + SUMMED], best, temperature))
    upto = sums.upto[block] + np.append(0.0, weights.cumsum())
    first, last = np.searchsorted(upto, (drawn.least, drawn.most), side="right")
    if first != last or not 0 < first < len(upto):
        raise RoundingDecides
    return begin + int(first) - 1
