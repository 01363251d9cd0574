"""From logits to tokens: vectorised over the batch, each row independent of the others.

The random number of a token is a pure function of (seed, output, position): a stream draws the same
tokens whatever else is in the batch, and goes on as it would have when it is resumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from server.arrays import Bools, Doubles, Floats, Ints
from server.checkpoint import TokenLogprobs
from server.engine.sampling.logits_processors import PenaltyState, ProcessorBatch
from server.engine.sampling.logprobs import token_logprobs
from server.errors import InvalidRequest, RequestError, StepFailed
from server.request import SamplingParameters

_Words = npt.NDArray[np.uint64]

_MOST_AHEAD = 64  # positions for which random numbers are made at once

NO_TOKEN_LEFT = -1
"""Drawn where the processors leave no token to draw."""

# Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)
_ROUNDS = np.arange(10, dtype=np.uint64)[:, None, None]
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


class Numbers:
    """The random numbers of a batch; the longer it stays as it is, the further ahead they are made.

    A call for many costs little more than one for a few.
    """

    def __init__(self, seed: _Words, output: _Words) -> None:
        self._seed = seed
        self._output = output
        self._rows = np.arange(len(seed))
        self._first: Ints = np.zeros(len(seed), np.int64)
        self._made: Doubles = np.zeros((len(seed), 0))

    def at(self, positions: Ints) -> Doubles:
        """The number of each row, `[B]`, for the token at `positions[B]`."""
        column = positions - self._first
        size = self._made.shape[1]
        if column.view(np.uint64).max() >= size:  # as unsigned, a negative one is huge
            size = min(max(1, 2 * size), _MOST_AHEAD)
            ahead = (positions[:, None] + np.arange(size)).ravel()
            seed, output = self._seed.repeat(size), self._output.repeat(size)
            self._made = uniform(seed, ahead, output).reshape(-1, size)
            self._first, column = positions, np.zeros_like(positions)
        numbers: Doubles = self._made[self._rows, column]
        return numbers


@dataclass(frozen=True)
class SamplingBatch:
    """The parameters of a batch, one array each, `[B]`."""

    temperature: Doubles
    top_k: Ints
    top_p: Doubles
    min_p: Doubles
    typical_p: Doubles
    numbers: Numbers
    processors: ProcessorBatch | None
    reported: Ints
    """Rows that report log-probabilities, `[R]`."""
    top: tuple[int, ...]
    """How many of the likeliest tokens each of them reports."""

    @staticmethod
    def of(
        parameters: Sequence[SamplingParameters], states: Sequence[PenaltyState | None] = ()
    ) -> SamplingBatch:
        """Columns from rows; a row whose parameters have processors needs its penalty state."""
        reports = [(row, p.logprobs) for row, p in enumerate(parameters) if p.logprobs is not None]
        return SamplingBatch(
            np.array([p.temperature for p in parameters], np.float64),
            np.array([p.top_k for p in parameters], np.int64),
            np.array([p.top_p for p in parameters], np.float64),
            np.array([p.min_p for p in parameters], np.float64),
            np.array([p.typical_p for p in parameters], np.float64),
            Numbers(
                np.array([p.seed for p in parameters], np.uint64),
                np.array([p.output for p in parameters], np.uint64),
            ),
            ProcessorBatch.of(states),
            np.array([row for row, _ in reports], np.int64),
            tuple(top for _, top in reports),
        )

    @cached_property
    def greedy(self) -> Ints:
        """Rows that draw the likeliest token."""
        return np.flatnonzero(self.temperature == 0)

    @cached_property
    def divisors(self) -> Doubles:
        """What logits are divided by, `[B, 1]`."""
        return np.where(self.temperature == 0, 1.0, self.temperature)[:, None]

    @cached_property
    def limited(self) -> Ints:
        """Rows with a top_k or a top_p."""
        return np.flatnonzero((self.top_k > 0) | (self.top_p < 1))

    @cached_property
    def floored(self) -> bool:
        """Whether a row has a min_p."""
        return bool(self.min_p.any())

    @cached_property
    def typical(self) -> Ints:
        """Rows with a typical_p."""
        return np.flatnonzero(self.typical_p < 1)

    def remember(self, tokens: Ints) -> None:
        """Take the tokens `[B]` that were drawn into the penalty states."""
        if self.processors is not None:
            self.processors.remember(tokens)

    def logprobs(self, logits: Floats, tokens: Ints) -> dict[int, TokenLogprobs]:
        """By row that reports them: of `tokens[B]`, drawn from `logits[B, vocabulary]`."""
        rows = self.reported
        if not len(rows):
            return {}
        logprobs = token_logprobs(logits[rows], tokens[rows], self.top)
        return dict(zip(rows.tolist(), logprobs, strict=True))


def sample(logits: Floats, batch: SamplingBatch, positions: Ints) -> Ints:
    """Draw one token a row from `logits[B, vocabulary]`; `positions[B]` are those of the tokens.

    In this order: processors, temperature, top_k, top_p, min_p, typical_p, each on what the ones
    before it left. Ties at a border are kept. A row that is left nothing gets `NO_TOKEN_LEFT`.
    """
    if batch.processors is None:
        return _draw(logits, batch, positions)
    changed = batch.processors.apply(logits, positions)
    possible = (changed > -np.inf).any(axis=1)
    return np.where(possible, _draw(changed, batch, positions), NO_TOKEN_LEFT)


def _draw(logits: Floats | Doubles, batch: SamplingBatch, positions: Ints) -> Ints:
    greedy = batch.greedy
    if len(greedy) == len(logits):
        likeliest: Ints = logits.argmax(axis=1)
        return likeliest
    weights = _exponentials(logits, batch.divisors)
    _keep(weights, batch.limited, _likeliest, batch.top_k, batch.top_p)
    if batch.floored:
        weights[weights < batch.min_p[:, None]] = 0  # the likeliest has 1
    _keep(weights, batch.typical, _typical, batch.typical_p)
    cumulated = weights.cumsum(axis=1)
    drawn = batch.numbers.at(positions) * cumulated[:, -1]
    picked: Ints = (cumulated > drawn[:, None]).argmax(axis=1)
    if len(greedy):
        picked[greedy] = logits[greedy].argmax(axis=1)
    return picked


def failures(logits: Floats, tokens: Ints, positions: Ints) -> dict[int, RequestError]:
    """By row, why `tokens[B]` of `logits[B, vocabulary]` for `positions[B]` cannot be used."""
    failed: dict[int, RequestError] = {}
    extremes = logits.max(initial=0), logits.min(initial=0)
    if all(map(math.isfinite, extremes)) and tokens.min(initial=0) >= 0:
        return failed  # as nearly always, and cheaper to see than row by row
    for row in np.flatnonzero(tokens == NO_TOKEN_LEFT).tolist():
        failed[row] = InvalidRequest(
            "sampling.allowed_token_ids, bad_words and stopping.min_tokens leave no token for "
            f"position {positions[row]}: allow more, or forbid less"
        )
    for row in np.flatnonzero(~np.isfinite(logits).all(axis=1)).tolist():
        failed[row] = StepFailed(
            f"the model produced a value that is not a number at position {positions[row]}"
        )
    return failed


def uniform(seeds: _Words, positions: Ints, output: _Words | int = 0) -> Doubles:
    """One number in [0, 1) a row, with 53 random bits, from Philox4x32-10."""
    at = positions.astype(np.uint64)
    counter = (at & _LOW, at >> _HALF, np.full_like(at, output), np.zeros_like(at))
    words = philox(counter, (seeds & _LOW, seeds >> _HALF))
    bits = (words[0] << _HALF | words[1]) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def philox(
    counter: tuple[_Words, _Words, _Words, _Words], key: tuple[_Words, _Words]
) -> tuple[_Words, _Words, _Words, _Words]:
    """Philox4x32-10: four 32-bit words from a 128-bit counter and a 64-bit key, elementwise."""
    even, odd = np.stack((counter[0], counter[2])), np.stack((counter[1], counter[3]))
    keys = (np.stack(key) + _ROUNDS * _WEYL) & _LOW  # [rounds, 2, …]
    for round_key in keys:
        product = even * _MULTIPLIERS
        even, odd = (product >> _HALF)[::-1] ^ odd ^ round_key, (product & _LOW)[::-1]
    return even[0], odd[0], even[1], odd[1]


def _exponentials(logits: Floats | Doubles, divisors: Doubles) -> Doubles:
    """Probabilities up to a factor: 1 for the likeliest token of each row."""
    weights: Doubles = logits / divisors
    with np.errstate(invalid="ignore"):  # rows that are not finite end; that is no news here
        weights -= weights.max(axis=1, keepdims=True)
    return np.exp(weights, out=weights)


def _keep(
    weights: Doubles, rows: Ints, kept: Callable[..., Bools], *columns: Ints | Doubles
) -> None:
    """Set to 0, in `rows[R]`, what `kept(weights, *columns)` of these rows leaves out."""
    if len(rows):
        ours = weights[rows]
        weights[rows] = np.where(kept(ours, *(column[rows] for column in columns)), ours, 0)


def _likeliest(weights: Doubles, top_k: Ints, top_p: Doubles) -> Bools:
    """What each row keeps under its top_k, then its top_p, `[B, vocabulary]`."""
    return weights >= floors(weights, top_k, top_p)[:, None]


def floors(weights: Doubles, top_k: Ints, top_p: Doubles) -> Doubles:
    """Smallest weight that each row keeps under its top_k, then top_p, `[B]`."""
    size = weights.shape[1]
    kept = np.where((top_k > 0) & (top_k < size), top_k, size)
    most = int(kept.max())
    falling = -np.sort(np.partition(-weights, most - 1)[:, :most])  # all that is needed in order
    floor = falling[np.arange(len(kept)), kept - 1]
    whole = np.where(weights >= floor[:, None], weights, 0).sum(axis=1)
    reached = falling.cumsum(axis=1) / whole[:, None]
    # Beyond kept there are only ties with the floor, if anything.
    needed = np.minimum((reached < top_p[:, None]).sum(axis=1), kept - 1)
    nucleus = falling[np.arange(len(kept)), needed]
    both: Doubles = np.where(top_p < 1, nucleus, floor)
    return both


def _typical(weights: Doubles, typical_p: Doubles) -> Bools:
    """What each row keeps under its typical_p, `[B, vocabulary]`."""
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
