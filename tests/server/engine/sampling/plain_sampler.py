"""The definition of sampling, token by token and row by row: slow, and plain to see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from server.checkpoint import TokenLogprobs
from server.request import LogitsProcessors, SamplingParameters

_NOTHING = float("-inf")
_CLOSE = 1e-9


class Ambiguous(Exception):
    """Rounding decides: a border falls where two ways to add may differ."""


def distribution(
    logits: Sequence[float],
    parameters: SamplingParameters,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
) -> list[float] | None:
    """Probability of each token after `prompt` and `output`; None if no token may be.

    Raises Ambiguous where a test could not tell a bug from rounding.
    """
    processors = parameters.processors or LogitsProcessors()
    logits = [_changed(token, x, processors, prompt, output) for token, x in enumerate(logits)]
    best = max(logits)
    if best == _NOTHING:
        return None
    if parameters.temperature == 0:
        likeliest = logits.index(best)
        return [float(token == likeliest) for token in range(len(logits))]
    weights = [math.exp((x - best) / parameters.temperature) for x in logits]
    for kept in (_top_k, _top_p, _min_p, _typical_p):
        keep = kept(weights, parameters)
        weights = [w if token in keep else 0.0 for token, w in enumerate(weights)]
    return [w / sum(weights) for w in weights]


def draw(probabilities: Sequence[float], number: float) -> int:
    """The token on which `number`, in [0, 1), falls. Raises Ambiguous too close to a border."""
    reached = 0.0
    for token, probability in enumerate(probabilities):
        reached += probability
        if probability and abs(reached - number) < _CLOSE:
            raise Ambiguous
        if number < reached:
            return token
    raise Ambiguous


def logprobs(logits: Sequence[float], token: int, top: int) -> TokenLogprobs:
    """Log-probabilities under the model's own distribution."""
    best = max(logits)
    whole = best + math.log(sum(math.exp(x - best) for x in logits))
    ids = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:top]
    return TokenLogprobs(
        logits[token] - whole, tuple(ids), tuple(logits[likely] - whole for likely in ids)
    )


def _changed(
    token: int,
    logit: float,
    processors: LogitsProcessors,
    prompt: Sequence[int],
    output: Sequence[int],
) -> float:
    for biased, bias in processors.bias:
        if token == biased:
            logit += bias
    if processors.allowed and token not in processors.allowed:
        return _NOTHING
    for word in processors.bad_words:
        if (*output, token)[-len(word) :] == word:
            return _NOTHING
    if token in processors.withheld and len(output) < processors.min_tokens:
        return _NOTHING
    if token in prompt or token in output:
        if logit > 0:
            logit /= processors.repetition_penalty
        else:
            logit *= processors.repetition_penalty
    logit -= processors.frequency_penalty * list(output).count(token)
    if token in output:
        logit -= processors.presence_penalty
    return logit


def _top_k(weights: list[float], parameters: SamplingParameters) -> set[int]:
    falling = sorted(weights, reverse=True)
    k = parameters.top_k
    floor = falling[k - 1] if 0 < k < len(falling) else 0.0
    return {token for token, w in enumerate(weights) if w >= floor}


def _top_p(weights: list[float], parameters: SamplingParameters) -> set[int]:
    if parameters.top_p == 1:
        return set(range(len(weights)))
    reached, floor, whole = 0.0, 0.0, sum(weights)
    for floor in sorted(weights, reverse=True):
        reached += floor / whole
        if abs(reached - parameters.top_p) < _CLOSE:
            raise Ambiguous
        if reached >= parameters.top_p:
            break
    return {token for token, w in enumerate(weights) if w >= floor}


def _min_p(weights: list[float], parameters: SamplingParameters) -> set[int]:
    floor = parameters.min_p * max(weights)
    if floor and any(0 < abs(w - floor) < _CLOSE for w in weights):
        raise Ambiguous
    return {token for token, w in enumerate(weights) if w >= floor}


def _typical_p(weights: list[float], parameters: SamplingParameters) -> set[int]:
    if parameters.typical_p == 1:
        return set(range(len(weights)))
    shares = {token: w / sum(weights) for token, w in enumerate(weights) if w > 0}
    entropy = -sum(share * math.log(share) for share in shares.values())
    distance = {token: abs(-math.log(share) - entropy) for token, share in shares.items()}
    order = sorted(shares, key=lambda token: distance[token])
    for one, other in pairwise(order):
        if 0 < distance[other] - distance[one] < _CLOSE:
            raise Ambiguous
    reached, furthest = 0.0, 0.0
    for token in order:
        reached, furthest = reached + shares[token], distance[token]
        if abs(reached - parameters.typical_p) < _CLOSE:
            raise Ambiguous
        if reached >= parameters.typical_p:
            break
    return {token for token in order if distance[token] <= furthest}
