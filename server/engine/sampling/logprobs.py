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
        return long_logprobs(list(logits), tokens.tolist(), top, np.empty(logits.shape[1]))
    logs = _log_softmax(logits)
    own = logs[np.arange(len(tokens)), tokens].tolist()
    most = min(max(top, default=0), logits.shape[1])
    likeliest = np.argsort(-logs, axis=1, kind="stable")[:, :most]
    values = np.take_along_axis(logs, likeliest, axis=1).tolist()
    return [
        TokenLogprobs(logprob, tuple(ids[:count]), tuple(best[:count]))
        for logprob, ids, best, count in zip(own, likeliest.tolist(), values, top, strict=True)
    ]


def long_logprobs(
    rows: Sequence[Floats], tokens: Sequence[int], top: Sequence[int], scratch: Doubles
) -> list[TokenLogprobs]:
    """The same for rows of a large vocabulary, without sorting them. Overwrites `scratch[V]`."""
    return [_of_row(*each, scratch) for each in zip(rows, tokens, top, strict=True)]


def surprisal(logits: Floats, tokens: Ints) -> Doubles:
    """Bits (negative log2-probability) of `tokens[T]` under `logits[T, vocabulary]`, `[T]`."""
    if logits.shape[1] >= LONG_ROW:
        scratch = np.empty(logits.shape[1])
        logs = logits[np.arange(len(tokens)), tokens].astype(np.float64)
        logs -= [_normaliser(row, scratch) for row in logits]
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


def _of_row(row: Floats, token: int, top: int, scratch: Doubles) -> TokenLogprobs:
    whole = _normaliser(row, scratch)
    if not math.isfinite(whole):
        return TokenLogprobs(math.nan, (), ())  # `failures` reports the row
    own = float(row[token]) - whole
    if not top:
        return TokenLogprobs(own, (), ())
    count = min(top, len(row))
    bound = likeliest(row, count)
    ids = reaching(row, bound, 1e-12 * (abs(bound) + abs(whole)))
    logs = row[ids].astype(np.float64) - whole
    order = np.argsort(-logs, kind="stable")[:count]
    return TokenLogprobs(own, tuple(ids[order].tolist()), tuple(logs[order].tolist()))


def _normaliser(row: Floats, scratch: Doubles) -> float:
    """The logarithm of the sum of the exponentials of the logits `row[V]`."""
    scratch[:] = row
    with np.errstate(over="ignore", invalid="ignore"):
        whole = float(np.exp(scratch, out=scratch).sum())
        if 1e-250 < whole < 1e250:
            return math.log(whole)
        best = float(row.max())
        np.subtract(row, best, out=scratch, dtype=np.float64)
        return best + float(np.log(np.exp(scratch, out=scratch).sum()))
