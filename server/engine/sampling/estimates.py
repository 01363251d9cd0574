"""Sums over a whole row of a large vocabulary, estimated with a limit to their error.

Shape: `V` vocabulary. An exponent is a logit divided by the temperature, less that of
the most likely token; its exponential is the token's weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from server.arrays import Doubles, Floats

SUMMED = 128
"""Number of tokens that are summed at once."""


class RoundingDecides(Exception):
    """An estimate is not good enough to tell which token it is."""


@dataclass(frozen=True)
class Scratch:
    """Memory that rows of `[V]` use one after the other; allocating it anew is slow."""

    row: Doubles
    """For the logits of a row with processors."""
    exponents: Doubles
    weights: Doubles

    @staticmethod
    def of(vocabulary: int) -> Scratch:
        """Scratch for rows of `vocabulary` tokens."""
        return Scratch(*np.empty((3, vocabulary)))

    @property
    def floats(self) -> Floats:
        """For the weights in float32."""
        return self.weights.view(np.float32)[: len(self.weights)]


@dataclass(frozen=True)
class Estimate:
    """Sums of the weights of a row.

    upto: before each block of `SUMMED` tokens and after the last one. error: largest difference
    to the sums of `whole_rows`.
    """

    upto: Doubles
    error: float

    @property
    def whole(self) -> float:
        """The sum of all weights."""
        return float(self.upto[-1])


Estimator = Callable[..., Estimate]


@dataclass(frozen=True)
class Limits:
    """Between which a sum lies."""

    least: float
    most: float

    @staticmethod
    def around(value: float, error: float) -> Limits:
        """Those of a sum that is estimated as `value`."""
        return Limits(value - error, value + error)


def exponents_of(
    row: Floats | Doubles, best: float, temperature: float, out: Doubles | None = None
) -> Doubles:
    """The exponents of the logits `row`, bit by bit as in `whole_rows`."""
    if temperature == 1:  # a division would change nothing, and take a while
        return np.subtract(row, best, out=out, dtype=np.float64)
    exponents: Doubles = np.divide(row, temperature, out=out, dtype=np.float64)
    exponents -= best / temperature
    return exponents


def rounding(count: int) -> float:
    """Largest error of a sum of `count` positive doubles in any order, relative to the sum."""
    return (count + 64) * 2.0**-50


def roughly(
    row: Floats | Doubles,
    best: float,
    temperature: float,
    scratch: Scratch,
    exponents: Floats | Doubles | None = None,
) -> Estimate:
    """Sums in float32, which is fast. Enough for most draws from what a language model says.

    The exponents stay in `exponents[V]`, if it is given.
    """
    if not 1e-30 < temperature < 1e30:
        raise RoundingDecides
    out = scratch.floats if exponents is None else exponents
    # If nothing can get too large or too small, the best exponent need not be 0.
    shift = 0.0 if exponents is None and -20 < best / temperature < 60 else best
    if exponents is not None or shift or row.dtype != np.float32:
        row = np.subtract(row, row.dtype.type(shift), out=out, casting="same_kind")
    if temperature != 1:
        with np.errstate(over="ignore"):
            row = np.multiply(row, np.float32(1 / temperature), out=out)
    np.exp(row, out=scratch.floats)
    # In units of half an ulp: of the sum of a block, of exp (4 ulp), and of the three roundings of
    # an exponent, whose distance to the best one is on average at most log(V).
    size = 1 + math.log(len(row)) + abs(best - shift) / temperature
    error = 2.0**-24 * (SUMMED + 8 + 3 * size)
    return _sums(scratch.floats, error, math.exp((shift - best) / temperature))


def closely(
    row: Floats | Doubles,
    best: float,
    temperature: float,
    scratch: Scratch,
    exponents: Floats | Doubles | None = None,
) -> Estimate:
    """Sums in float64. The exponents stay in `scratch.exponents`."""
    out = exponents_of(row, best, temperature, scratch.exponents)
    return _sums(np.exp(out, out=scratch.weights), rounding(len(row)))


def _sums(weights: Floats | Doubles, error: float, unit: float = 1.0) -> Estimate:
    end = len(weights) // SUMMED * SUMMED
    upto = np.zeros(end // SUMMED + 2)
    # Not `@`: a sum is not worth the threads that it would wake.
    upto[1:-1] = np.einsum("ij->i", weights[:end].reshape(-1, SUMMED))
    upto[-1] = weights[end:].sum()
    np.cumsum(upto, out=upto)
    upto *= unit
    return Estimate(upto, error * float(upto[-1]))


def mean_of(exponents: Floats | Doubles, weights: Floats | Doubles, whole: float) -> float:
    """The mean of the exponents by weight."""
    end = len(weights) // SUMMED * SUMMED
    blocks = (values[:end].reshape(-1, SUMMED) for values in (exponents, weights))
    with np.errstate(invalid="ignore"):
        rest = (exponents[end:] * weights[end:]).sum()
        mean = float(np.einsum("ij,ij->i", *blocks).sum(dtype=np.float64) + rest) / whole
    if math.isnan(mean):  # 0 times -inf
        return mean_of(np.maximum(exponents, -1e4), weights, whole)
    return mean
