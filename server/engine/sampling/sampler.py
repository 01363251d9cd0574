"""Draws tokens from logits, vectorised over the batch. Each row is independent of the others.

The random number of a token is a pure function of (seed, output, position). So a stream draws the
same tokens in any batch, and also when it is resumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from server.arrays import Doubles, Floats, Ints
from server.checkpoint import TokenLogprobs
from server.engine.sampling import long_rows, whole_rows
from server.engine.sampling.estimates import Scratch
from server.engine.sampling.grammar_state import GrammarState
from server.engine.sampling.logits_processors import PenaltyState, ProcessorBatch
from server.engine.sampling.logprobs import long_logprobs, token_logprobs
from server.engine.sampling.long_rows import LONG_ROW
from server.engine.sampling.whole_rows import Filters
from server.errors import InvalidRequest, RequestError, StepFailed
from server.request import SamplingParameters

_Words = npt.NDArray[np.uint64]

_MOST_AHEAD = 64  # largest number of positions to compute random numbers for at once

NO_TOKEN_LEFT = -1
"""Drawn in a row where logits processors or grammar forbid all tokens."""

GRAMMAR_FAULT = -2
"""Drawn in a row whose grammar cannot be followed."""

# Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], np.uint64)
_ROUNDS = np.arange(10, dtype=np.uint64)[:, None, None]
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


class RandomNumbers:
    """The random numbers of a batch, computed ahead for several positions at once.

    One large call costs little more than a small one. The longer the batch stays the same, the more
    numbers each call computes.
    """

    def __init__(self, seed: _Words, output: _Words) -> None:
        self._seed = seed
        self._output = output
        self._rows = np.arange(len(seed))
        self._first: Ints = np.zeros(len(seed), np.int64)
        self._made: Doubles = np.zeros((len(seed), 0))

    def at(self, positions: Ints) -> Doubles:
        """The random number of each row for the token at `positions[B]`, `[B]`."""
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
    """The sampling parameters of a batch, one array `[B]` for each."""

    parameters: tuple[SamplingParameters, ...]
    """Those of each row, `[B]`."""
    filters: Filters
    numbers: RandomNumbers
    processors: ProcessorBatch | None
    reported: Ints
    """Rows that report log-probabilities, `[R]`."""
    top: tuple[int, ...]
    """Number of most likely tokens that each of them reports."""
    grammars: dict[int, GrammarState] = field(default_factory=dict, repr=False)
    """Of the rows that have one."""
    made: dict[int, Scratch] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(
        parameters: Sequence[SamplingParameters],
        states: Sequence[PenaltyState | None] = (),
        grammars: Sequence[GrammarState | None] = (),
    ) -> SamplingBatch:
        """The batch of `parameters`, penalty `states` and `grammars`, one of each for each row.

        `states` may be empty if no row has logits processors, `grammars` if none has a grammar.
        """
        reports = [(row, p.logprobs) for row, p in enumerate(parameters) if p.logprobs is not None]
        return SamplingBatch(
            tuple(parameters),
            Filters.of(parameters),
            RandomNumbers(
                np.array([p.seed for p in parameters], np.uint64),
                np.array([p.output for p in parameters], np.uint64),
            ),
            ProcessorBatch.of(states),
            np.array([row for row, _ in reports], np.int64),
            tuple(top for _, top in reports),
            {row: state for row, state in enumerate(grammars) if state is not None},
        )

    def scratch(self, vocabulary: int) -> Scratch:
        """Memory for drawing from rows of `vocabulary` tokens, kept for the next step."""
        if vocabulary not in self.made:
            self.made[vocabulary] = Scratch.of(vocabulary)
        return self.made[vocabulary]

    def remember(self, tokens: Ints) -> None:
        """Add the drawn `tokens[B]` to the penalty states and the grammars."""
        if self.processors is not None:
            self.processors.remember(tokens)
        for row, grammar in self.grammars.items():
            if (token := int(tokens[row])) >= 0:
                grammar.push((token,))

    def logprobs(self, logits: Floats, tokens: Ints) -> dict[int, TokenLogprobs]:
        """Log-probabilities of `tokens[B]` under `logits[B, vocabulary]`, by reporting row."""
        rows = self.reported
        if not len(rows):
            return {}
        if logits.shape[1] >= LONG_ROW:
            scratch = self.scratch(logits.shape[1]).weights
            ours = [logits[row] for row in rows.tolist()]
            logprobs = long_logprobs(ours, tokens[rows].tolist(), self.top, scratch)
        else:
            logprobs = token_logprobs(logits[rows], tokens[rows], self.top)
        return dict(zip(rows.tolist(), logprobs, strict=True))


def sample(logits: Floats, batch: SamplingBatch, positions: Ints) -> Ints:
    """Draw the token at `positions[B]` for each row of `logits[B, vocabulary]`, `[B]`.

    Applies grammars, logits processors, temperature, top_k, top_p, min_p and typical_p, in this
    order; each filters what the one before it keeps. Ties with the last token kept are kept, too. A
    row without any token left gets `NO_TOKEN_LEFT`, one whose grammar fails `GRAMMAR_FAULT`.
    """
    if logits.shape[1] >= LONG_ROW:
        return _draw_long(logits, batch, positions)
    changed: Floats | Doubles = logits
    if batch.processors is not None:
        changed = batch.processors.apply(logits, positions)
    elif batch.grammars:
        changed = logits.copy()
    else:
        return _draw(logits, batch, positions)
    for row, grammar in batch.grammars.items():
        changed[row, ~grammar.allowed()] = -np.inf
    possible = (changed > -np.inf).any(axis=1)
    tokens = np.where(possible, _draw(changed, batch, positions), NO_TOKEN_LEFT)
    for row, grammar in batch.grammars.items():
        if grammar.fault:
            tokens[row] = GRAMMAR_FAULT
    return tokens


def _draw(logits: Floats | Doubles, batch: SamplingBatch, positions: Ints) -> Ints:
    if len(batch.filters.greedy) == len(logits):
        likeliest: Ints = logits.argmax(axis=1)
        return likeliest
    return whole_rows.draw(logits, batch.filters, batch.numbers.at(positions))


def _draw_long(logits: Floats, batch: SamplingBatch, positions: Ints) -> Ints:
    processors, tokens = batch.processors, np.empty(len(logits), np.int64)
    scratch = batch.scratch(logits.shape[1])
    numbers = batch.numbers.at(positions).tolist()
    owners = {} if processors is None else processors.owners
    for row, (parameters, number) in enumerate(zip(batch.parameters, numbers, strict=True)):
        ours: Floats | Doubles = logits[row]
        grammar = batch.grammars.get(row)
        if processors is not None and row in owners:
            position = int(positions[row])
            ours = processors.apply_to(owners[row], logits[row], position, scratch.row)
        if grammar is not None:
            np.copyto(scratch.row, ours)
            ours = scratch.row
            ours[~grammar.allowed()] = -np.inf
            if grammar.fault:
                tokens[row] = GRAMMAR_FAULT
                continue
        if ours is scratch.row and ours.max() == -np.inf:
            tokens[row] = NO_TOKEN_LEFT
            continue
        tokens[row] = long_rows.draw(ours, parameters, number, scratch)
    return tokens


def failures(logits: Floats, tokens: Ints, positions: Ints) -> dict[int, RequestError]:
    """The errors, by row, of `tokens[B]` drawn from `logits[B, vocabulary]` at `positions[B]`."""
    failed: dict[int, RequestError] = {}
    extremes = logits.max(initial=0), logits.min(initial=0)
    if all(map(math.isfinite, extremes)) and tokens.min(initial=0) >= 0:
        return failed  # the usual case, and cheaper to check than row by row
    for row in np.flatnonzero(tokens == NO_TOKEN_LEFT).tolist():
        failed[row] = InvalidRequest(
            "sampling.allowed_token_ids, bad_words, grammar and stopping.min_tokens leave no token "
            f"for position {positions[row]}: allow more, or forbid less"
        )
    for row in np.flatnonzero(tokens == GRAMMAR_FAULT).tolist():
        failed[row] = InvalidRequest(
            f"sampling.grammar cannot be followed beyond position {positions[row]}: it has too "
            "many ways to go on, or other tokens came before than it allows; simplify it",
            field="sampling.grammar",
        )
    for row in np.flatnonzero(~np.isfinite(logits).all(axis=1)).tolist():
        failed[row] = StepFailed(
            f"the model produced a value that is not a number at position {positions[row]}"
        )
    return failed


def uniform(seeds: _Words, positions: Ints, output: _Words | int = 0) -> Doubles:
    """Random numbers in [0, 1) of 53 bits, one for each seed and position, from Philox4x32-10."""
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
