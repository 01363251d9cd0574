"""The sampler as it was before it knew large vocabularies: whole rows, dense penalties, full sorts.

Streams of its time are to get the same tokens for ever, so it stays as it was: the oracle of
`test_same_tokens.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from server.arrays import Bools, Doubles, Floats, Ints
from server.engine.sampling.sampler import NO_TOKEN_LEFT, uniform
from server.request import LogitsProcessors, SamplingParameters


class OldPenalties:
    """What one stream has: offsets, counts and seen tokens as rows of the vocabulary."""

    def __init__(
        self, processors: LogitsProcessors, prompt: Sequence[int], vocabulary: int
    ) -> None:
        self.processors, self.first = processors, len(prompt)
        self.offset = np.zeros(vocabulary)
        for token, bias in processors.bias:
            self.offset[token] = bias
        if processors.allowed:
            self.offset[np.setdiff1d(np.arange(vocabulary), processors.allowed)] = -np.inf
        self.seen = np.zeros(vocabulary, np.bool_)
        self.seen[list(prompt)] = True
        self.counts = np.zeros(vocabulary, np.int64)
        self.output: list[int] = []

    def remember(self, token: int) -> None:
        """Adds a drawn token."""
        self.counts[token] += 1
        self.seen[token] = True
        self.output.append(token)

    def apply(self, logits: Floats, position: int) -> Doubles:
        """A changed copy of `logits[vocabulary]`."""
        p = self.processors
        ours: Doubles = logits.astype(np.float64) + self.offset
        for word in p.bad_words:
            start = list(word[:-1])
            if self.output[len(self.output) - len(start) :] == start:
                ours[word[-1]] = -np.inf
        if position < self.first + p.min_tokens:
            ours[list(p.withheld)] = -np.inf
        penalty = p.repetition_penalty
        scaled = np.where(ours > 0, ours / penalty, ours * penalty)
        ours = np.where(self.seen, scaled, ours)
        ours -= p.frequency_penalty * self.counts + p.presence_penalty * (self.counts > 0)
        return ours


def old_sample(
    logits: Floats,
    parameters: SamplingParameters,
    position: int,
    penalties: OldPenalties | None = None,
) -> int:
    """The token at `position`, drawn from `logits[vocabulary]`."""
    changed = logits if penalties is None else penalties.apply(logits, position)
    if penalties is not None and not (changed > -np.inf).any():
        return NO_TOKEN_LEFT
    if parameters.temperature == 0:
        return int(changed.argmax())
    weights = _exponentials(changed[None], np.array([[parameters.temperature]]))
    row = np.zeros(1, np.int64)
    top_k, top_p = np.array([parameters.top_k]), np.array([parameters.top_p])
    if parameters.top_k > 0 or parameters.top_p < 1:
        _keep(weights, row, _likeliest, top_k, top_p)
    if parameters.min_p:
        weights[weights < parameters.min_p] = 0
    if parameters.typical_p < 1:
        _keep(weights, row, _typical, np.array([parameters.typical_p]))
    cumulated = weights.cumsum(axis=1)
    seed, output = (np.array([n], np.uint64) for n in (parameters.seed, parameters.output))
    drawn = uniform(seed, np.array([position]), output) * cumulated[:, -1]
    return int((cumulated > drawn[:, None]).argmax(axis=1)[0])


def _exponentials(logits: Floats | Doubles, divisors: Doubles) -> Doubles:
    """Probabilities, scaled so that the most likely token of each row has 1."""
    weights: Doubles = logits / divisors
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
