"""How likely the model held a token: by its own distribution, before any logits change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from server.arrays import Doubles, Floats, Ints
from server.checkpoint import TokenLogprobs


def token_logprobs(logits: Floats, tokens: Ints, top: Sequence[int]) -> list[TokenLogprobs]:
    """Of `tokens[T]` under `logits[T, vocabulary]`, with the `top[T]` likeliest each.

    Among tokens that are alike, the lower id comes first.
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
    """Bits by which `logits[T, vocabulary]` are surprised at `tokens[T]`."""
    bits: Doubles = -_log_softmax(logits)[np.arange(len(tokens)), tokens] / np.log(2)
    return bits


def _log_softmax(logits: Floats) -> Doubles:
    logs = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # rows that are not finite end; that is no news here
        logs -= logs.max(axis=1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(axis=1, keepdims=True))
    return logs
