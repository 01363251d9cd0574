"""Draws from one row of a large vocabulary, without looking closely at the tokens that cannot be.

Gives the tokens of `whole_rows`. What is kept is weighed as there, bit by bit. Sums over a whole
row are only estimated, with a limit to their error: where that leaves a doubt, the next better
estimate decides, and in the end `whole_rows` itself.

Shapes: `V` vocabulary, `C` candidates. An exponent is a logit divided by the temperature, less that
of the most likely token; its exponential is the token's weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from server.arrays import Bools, Doubles, Floats, Ints
from server.engine.sampling import whole_rows
from server.request import SamplingParameters

LONG_ROW = 4096
"""Smallest vocabulary whose rows are drawn one by one. Smaller ones are faster all at once."""

_BLOCK = 64  # tokens whose maximum is taken at once
_SUMMED = 128  # tokens that are summed at once
_CLOSE = 1e-9  # exponents that differ by less may change places by rounding


class _RoundingDecides(Exception):
    """An estimate is not good enough to tell which token it is."""


@dataclass(frozen=True)
class Scratch:
    """Memory that rows of `[V]` use one after the other; allocating it anew is slow."""

    row: Doubles
    """For the logits of a row with processors."""
    exponents: Doubles
    weights: Doubles
    floats: Floats

    @staticmethod
    def of(vocabulary: int) -> Scratch:
        """Scratch for rows of `vocabulary` tokens."""
        row, exponents, weights = np.empty((3, vocabulary))
        return Scratch(row, exponents, weights, weights.view(np.float32)[:vocabulary])


@dataclass(frozen=True)
class _Estimate:
    """Sums of the weights of a row.

    upto: before each block of `_SUMMED` tokens and after the last one. error: largest difference
    to the sums of `whole_rows`.
    """

    upto: Doubles
    error: float

    @property
    def whole(self) -> float:
        """The sum of all weights."""
        return float(self.upto[-1])


def draw(
    row: Floats | Doubles, parameters: SamplingParameters, number: float, scratch: Scratch
) -> int:
    """The token on which `number` falls, in the logits `row[V]`."""
    if parameters.temperature == 0:
        return int(row.argmax())
    best = float(row.max())
    if not math.isfinite(best):
        return 0  # any: `failures` reports the row
    for estimate in (_roughly, _closely):
        try:
            return _draw(row, best, parameters, number, scratch, estimate)
        except _RoundingDecides:
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
    with np.errstate(over="ignore"):
        least = np.nextafter(row.dtype.type(bound), row.dtype.type(-np.inf))
    return np.flatnonzero(row >= least)


def _draw(
    row: Floats | Doubles,
    best: float,
    parameters: SamplingParameters,
    number: float,
    scratch: Scratch,
    estimate: Callable[[Floats | Doubles, float, float, Scratch], _Estimate],
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
        exponents = _exponents(row, best, temperature, scratch.exponents)
        ids, weights = _typical(exponents, np.exp(exponents, out=scratch.weights), typical_p)
        typical_p = 1.0
    else:
        sums = estimate(row, best, temperature, scratch)
        return _locate(row, best, temperature, number, sums)
    if parameters.min_p:
        ids, weights = _where(weights >= parameters.min_p, ids, weights)
    if typical_p < 1:
        chosen, weights = _typical(_exponents(row[ids], best, temperature), weights, typical_p)
        ids = ids[chosen]
    cumulated = weights.cumsum()
    drawn = number * cumulated[-1]
    return int(ids[np.searchsorted(cumulated, drawn, side="right")])


# ---- candidates, weighed as in `whole_rows`


def _exponents(
    row: Floats | Doubles, best: float, temperature: float, out: Doubles | None = None
) -> Doubles:
    if temperature == 1:  # a division would change nothing, and take a while
        return np.subtract(row, best, out=out, dtype=np.float64)
    exponents: Doubles = np.divide(row, temperature, out=out, dtype=np.float64)
    exponents -= best / temperature
    return exponents


def _candidates(
    row: Floats | Doubles, best: float, temperature: float, bound: float
) -> tuple[Ints, Doubles]:
    """Ids and weights of the tokens whose logit is at least `bound`, `[C]` each.

    Some that are a little less likely are among them, since weights are rounded, too.
    """
    ids = reaching(row, bound, 1e-12 * temperature + 1e-14 * abs(best))
    return ids, np.exp(_exponents(row[ids], best, temperature))


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
    falling = -np.sort(-weights)
    whole = float(weights.sum())
    enough = _Limits.around(parameters.top_p * whole, _rounding(len(ids)) * whole)
    return _where(weights >= _floor(falling, falling.cumsum(), enough), ids, weights)


def _top_p(
    row: Floats | Doubles, best: float, parameters: SamplingParameters, sums: _Estimate
) -> tuple[Ints, Doubles]:
    """Ids and weights of the tokens that are left after a top_p, and some that min_p drops."""
    temperature, top_p, min_p = parameters.temperature, parameters.top_p, parameters.min_p
    enough = _Limits.around(top_p * sums.whole, sums.error)
    for part in (0.5, 0.02, 0.0):  # of what may be missing
        if min_p:
            bound = best + temperature * math.log(min_p)
        else:
            bound = _without(row, best, temperature, part * (1 - top_p) * sums.whole)
        ids, weights = _candidates(row, best, temperature, bound)
        if sums.error * len(ids) > sums.whole:
            raise _RoundingDecides  # most likely; no need to sort them
        falling = -np.sort(-weights)
        reached = falling.cumsum()
        if reached[-1] >= enough.most:
            break
        if min_p and reached[-1] < enough.least:
            return ids, weights
    return _where(weights >= _floor(falling, reached, enough), ids, weights)


def _without(row: Floats | Doubles, best: float, temperature: float, mass: float) -> float:
    """A logit so that the tokens below it have about the `mass`, by a sample; maybe -inf."""
    rising = row[::_BLOCK].copy()
    rising.sort()
    below = _BLOCK * np.exp(_exponents(rising, best, temperature)).cumsum()
    index = int(np.searchsorted(below, mass, side="right"))
    return float(rising[index - 1]) if mass and index else -math.inf


@dataclass(frozen=True)
class _Limits:
    """Between which a sum lies."""

    least: float
    most: float

    @staticmethod
    def around(value: float, error: float) -> _Limits:
        return _Limits(value - error, value + error)


def _floor(falling: Doubles, reached: Doubles, enough: _Limits) -> float:
    """The first of the `falling` weights with which the sum is enough."""
    first, last = np.searchsorted(reached, (enough.least, enough.most))
    if last == len(falling) or falling[first] != falling[last]:
        raise _RoundingDecides
    return float(falling[first])


def _typical(exponents: Doubles, weights: Doubles, typical_p: float) -> tuple[Ints, Doubles]:
    """Indices and weights of those that are left after a typical_p. Overwrites `exponents`.

    The surprise of a token is above the entropy as far as its exponent is below the mean.
    """
    whole = float(weights.sum())
    with np.errstate(invalid="ignore"):
        mean = np.einsum("i,i", weights, exponents) / whole
    if math.isnan(mean):
        exponents = np.maximum(exponents, -1e4)  # the weight of a lower one is 0
        mean = np.einsum("i,i", weights, exponents) / whole
    exponents -= mean
    nearness = np.negative(np.abs(exponents, out=exponents), out=exponents)
    enough = _Limits.around(typical_p * whole, _rounding(len(weights)) * whole)
    for count in (512, len(weights) // 8, len(weights)):
        bound = -math.inf if 4 * count > len(weights) else likeliest(nearness, count)
        near = np.flatnonzero(nearness >= bound)
        order = near[np.argsort(-nearness[near], kind="stable")]
        index = int(np.searchsorted(weights[order].cumsum(), typical_p * whole))
        edge = nearness[order[min(index, len(order) - 1)]]
        if index < len(order) and edge - _CLOSE >= bound:
            break
    close = nearness[near]
    chosen, inner = near[close >= edge - _CLOSE], near[close > edge + _CLOSE]
    outermost = near[(close >= edge - _CLOSE) & (close <= edge + _CLOSE)]
    same = (weights[outermost] == weights[outermost[0]]).all()
    if not (same and weights[inner].sum() < enough.least and enough.most <= weights[chosen].sum()):
        raise _RoundingDecides
    return chosen, weights[chosen]


# ---- sums of whole rows


def _rounding(count: int) -> float:
    """Largest error of a sum of `count` positive doubles in any order, relative to the sum."""
    return (count + 64) * 2.0**-50


def _roughly(row: Floats | Doubles, best: float, temperature: float, scratch: Scratch) -> _Estimate:
    """In float32, which is fast. Enough for most draws from what a language model says."""
    if not 1e-30 < temperature < 1e30:
        raise _RoundingDecides
    out = scratch.floats
    np.subtract(row, row.dtype.type(best), out=out, casting="same_kind")
    if temperature != 1:
        with np.errstate(over="ignore"):
            out *= np.float32(1 / temperature)
    np.exp(out, out=out)
    # In units of half an ulp: of the sum of a block, of exp (4 ulp), and of the three roundings of
    # an exponent, which on average is at most log(V) in size.
    return _sums(out, 2.0**-24 * (_SUMMED + 8 + 3 * (1 + math.log(len(row)))))


def _closely(row: Floats | Doubles, best: float, temperature: float, scratch: Scratch) -> _Estimate:
    exponents = _exponents(row, best, temperature, scratch.exponents)
    return _sums(np.exp(exponents, out=exponents), _rounding(len(row)))


def _sums(weights: Floats | Doubles, error: float) -> _Estimate:
    size = len(weights) // _SUMMED
    upto, blocks = np.zeros(size + 2), weights[: size * _SUMMED].reshape(size, _SUMMED)
    # Not `@`: a sum is not worth the threads that it would wake.
    upto[1:-1] = np.einsum("ij->i", blocks)
    upto[-1] = weights[size * _SUMMED :].sum()
    upto = upto.cumsum()
    return _Estimate(upto, error * float(upto[-1]))


def _locate(
    row: Floats | Doubles, best: float, temperature: float, number: float, sums: _Estimate
) -> int:
    """The token on which `number` falls, if all tokens may be drawn."""
    drawn = _Limits.around(number * sums.whole, 2 * sums.error)
    block = max(0, int(np.searchsorted(sums.upto, number * sums.whole, side="right")) - 1)
    begin = block * _SUMMED
    weights = np.exp(_exponents(row[begin : begin + _SUMMED], best, temperature))
    upto = sums.upto[block] + np.append(0.0, weights.cumsum())
    first, last = np.searchsorted(upto, (drawn.least, drawn.most), side="right")
    if first != last or not 0 < first < len(upto):
        raise _RoundingDecides
    return begin + int(first) - 1
