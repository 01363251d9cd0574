"""Log-probabilities of tokens under the model, before logits processors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from server.arrays import Doubles, Floats, Ints
from server.checkpoint import TokenLogprobs


def token_logprobs(logits: Floats, tokens: Ints, top: Sequence[int]) -> list[TokenLogprobs]:
    """Log-probabilities of `tokens[T]` under `logits[T, vocabulary]`.

    Each has the `top[T]` most likely tokens, too. Of equally likely tokens, the lower id is first.
    """
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
    bits: Doubles = -_log_softmax(logits)[np.arange(len(tokens)), tokens] / np.log(2)
    return bits


def _log_softmax(logits: Floats) -> Doubles:
    logs = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # `failures` reports rows that are not finite
        logs -= logs.max(axis=1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(axis=1, keepdims=True))
    return logs
