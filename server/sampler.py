"""From logits to tokens: vectorised over the batch, each row independent of the others.

The random number of a token is a pure function of (seed, output, position): a stream draws the same
tokens whatever else is in the batch, and goes on as it would have when it is resumed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

# Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


@dataclass(frozen=True)
class SamplingParameters:
    """How one stream draws its tokens; see the field comments in generation_service.proto."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class SamplingBatch:
    """The parameters of a batch, one array each, `[B]`."""

    temperature: Doubles
    top_k: Ints
    top_p: Doubles
    min_p: Doubles
    seed: _Words

    @staticmethod
    def of(parameters: list[SamplingParameters]) -> SamplingBatch:
        """Columns from rows."""
        return SamplingBatch(
            np.array([p.temperature for p in parameters], np.float64),
            np.array([p.top_k for p in parameters], np.int64),
            np.array([p.top_p for p in parameters], np.float64),
            np.array([p.min_p for p in parameters], np.float64),
            np.array([p.seed for p in parameters], np.uint64),
        )


def sample(logits: Floats, batch: SamplingBatch, positions: Ints, output: int = 0) -> Ints:
    """Draw one token a row from `logits[B, vocabulary]`; `positions[B]` are those of the tokens.

    In this order: temperature, top_k, top_p on what is left, min_p. Ties at a border are kept.
    """
    greedy = batch.temperature == 0
    chosen: Ints = logits.argmax(axis=1)
    if greedy.all():
        return chosen
    weights = _softmax(logits, np.where(greedy, 1.0, batch.temperature))
    filtered = (batch.top_k > 0) | (batch.top_p < 1)
    if filtered.any():
        rows = np.flatnonzero(filtered)
        floor = _floors(weights[rows], batch.top_k[rows], batch.top_p[rows])
        weights[rows] = np.where(weights[rows] >= floor[:, None], weights[rows], 0)
    floor = batch.min_p * weights.max(axis=1)
    weights[weights < floor[:, None]] = 0
    cumulated = weights.cumsum(axis=1)
    drawn = uniform(batch.seed, positions, output) * cumulated[:, -1]
    picked = (cumulated <= drawn[:, None]).sum(axis=1)
    return np.where(greedy, chosen, picked)


def uniform(seeds: _Words, positions: Ints, output: int = 0) -> Doubles:
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
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def surprisal(logits: Floats, tokens: Ints) -> Doubles:
    """Bits by which `logits[T, vocabulary]` are surprised at `tokens[T]`."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    norm = np.log(np.exp(wide).sum(axis=1))
    bits: Doubles = (norm - wide[np.arange(len(tokens)), tokens]) / np.log(2)
    return bits


def _softmax(logits: Floats, temperature: Doubles) -> Doubles:
    scaled = logits / temperature[:, None]
    with np.errstate(invalid="ignore"):  # rows that are not finite end; that is no news here
        scaled -= scaled.max(axis=1, keepdims=True)
    weights: Doubles = np.exp(scaled)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


def _floors(weights: Doubles, top_k: Ints, top_p: Doubles) -> Doubles:
    """Smallest probability that each row keeps under its top_k, then top_p, `[B]`."""
    size = weights.shape[1]
    falling = -np.sort(-weights, axis=1)
    kept = np.where((top_k > 0) & (top_k < size), top_k, size)
    floor = falling[np.arange(len(kept)), kept - 1]
    falling[falling < floor[:, None]] = 0
    reached = falling.cumsum(axis=1) / falling.sum(axis=1, keepdims=True)
    needed = (reached < top_p[:, None]).sum(axis=1).clip(max=size - 1)
    nucleus = falling[np.arange(len(kept)), needed]
    both: Doubles = np.where(top_p < 1, np.maximum(floor, nucleus), floor)
    return both
