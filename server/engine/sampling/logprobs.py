"""Log-probabilities of tokens under the model, before logits processors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from server.arrays import Doubles, Floats, Ints
from server.checkpoint import TokenLogprobs
from server.engine.sampling.long_rows import LONG_ROW, likeliest, reaching


def token_logprobs(logits: Floats, tokens: Ints, top: Sequence[int]) -> list[TokenLogprobs]:
    """Log-probabilities of `tokens[T]` under `logits[T, vocabulary]`.

    Each has the `top[T]` most likely tokens, too. Of equally likely tokens, the lower id is first.
    """
    if logits.shape[1] >= LONG_ROW:
        rows, scratch = zip(logits, tokens.tolist(), top, strict=True), np.empty(logits.shape[1])
        return [_of_long_row(row, token, count, scratch) for row, token, count in rows]
    logs = _log_softmax(logits)
    own = logs[np.arange(len(tokens)), tokens].tolist()
    most = min(max(top, default=0), logits.shape[1])
    likeliest = np.argsort(-logs, axis=1, kind="stable")[:, :most]
    values = np.take_along_axis(logs, likeliest, axis=1).tolist()
    return [
        TokenLogprobs(logprob, tuple(ids[:count]), tuple(best[:count]))
        for logprob, ids, best, count in zip(own, likeliest.tolist(), values, top, strict=True)
    ]


def surprisal(logits: Floats, tokens: Ints) -> Doubles:
    """Bits (negative log2-probability) of `tokens[T]` under `logits[T, vocabulary]`, `[T]`."""
    if logits.shape[1] >= LONG_ROW:
        scratch = np.empty(logits.shape[1])
        normalisers = np.array([_normaliser(row, scratch) for row in logits]).reshape(-1, 2)
        logs = logits[np.arange(len(tokens)), tokens] - normalisers.sum(axis=1)
    else:
        logs = _log_softmax(logits)[np.arange(len(tokens)), tokens]
    bits: Doubles = -logs / np.log(2)
    return bits


def _log_softmax(logits: Floats) -> Doubles:
    logs = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # `failures` reports rows that are not finite
        logs -= logs.max(axis=1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(axis=1, keepdims=True))
    return logs


def _of_long_row(row: Floats, token: int, top: int, scratch: Doubles) -> TokenLogprobs:
    """The same for one row of a large vocabulary, without sorting it."""
    best, rest = _normaliser(row, scratch)
    if not math.isfinite(rest):
        return TokenLogprobs(math.nan, (), ())  # `failures` reports the row
    own = float(row[token]) - best - rest
    if not top:
        return TokenLogprobs(own, (), ())
    count = min(top, len(row))
    bound = likeliest(row, count)
    ids = reaching(row, bound, 1e-12 * (abs(best) + abs(bound) + rest))
    logs = row[ids].astype(np.float64) - best - rest
    order = np.argsort(-logs, kind="stable")[:count]
    return TokenLogprobs(own, tuple(ids[order].tolist()), tuple(logs[order].tolist()))


def _normaliser(row: Floats, scratch: Doubles) -> tuple[float, float]:
    """What to subtract from the logits `row[V]`: the largest, and the logarithm of the rest."""
    best = float(row.max())
    scratch[:] = row
    with np.errstate(invalid="ignore"):
        scratch -= best
    return best, float(np.log(np.exp(scratch, out=scratch).sum()))
