"""Combiner-Logsparse, exact and hierarchical: one entry per set bit of the position.

A token at position i attends to itself and to the spans of the binary decomposition of i: for every
set bit l, 2^l tokens that begin at i with the bits up to l cleared (a Fenwick tree). The cache is a
stack that folds like the carries of a binary counter.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from model.attention import NEVER, expectation, future, push, softmax, write
from model.config import ModelConfig
from model.patterns.pattern import Pattern, Place, Schedule, State, StateTensor, Support

Spans = tuple[Tensor, Tensor, Tensor]
"""Pooled queries, keys and values of neighbouring spans, each `[B, H, spans, D]`."""


class Logsparse(Pattern):
    """The paper's function: the value of a span is the expectation over all of its tokens.

    The values of two halves do not determine that of the whole, so a history keeps the raw keys and
    values. State grows with L, the number of entries with log L.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.schedule = Schedule(2, binary=True)
        self.stack = (config.heads, 1 + _most_bits(config.context), config.head_dim)
        self.history = (config.context, config.heads, config.head_dim)

    def support(self, position: int) -> Support:
        """See Pattern."""
        spans = [
            range(begin := position >> bit + 1 << bit + 1, begin + (1 << bit))
            for bit in reversed(range(position.bit_length()))
            if position >> bit & 1
        ]
        return Support.of([position], spans)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """See Pattern."""
        length = q.shape[2]
        bits = (length - 1).bit_length()
        padding = (0, 0, 0, (1 << bits) - length)
        q, k, v = (F.pad(y, padding) for y in (q, k, v))
        logits, summaries, level = [(q * k).sum(dim=-1)], [], (q, k, v)
        for bit in range(bits):
            # Of two neighbouring spans, every token of the right one reads the left one.
            left_k, left_v = (y[:, :, ::2, None] for y in level[1:])  # [B, H, pairs, 1, D]
            readers = q.unflatten(2, (-1, 2, 1 << bit))[:, :, :, 1]  # [B, H, pairs, 2^bit, D]
            seen = (readers @ left_k.transpose(-1, -2)).squeeze(-1)
            unseen = torch.full_like(seen, float("-inf"))
            logits.append(torch.stack((unseen, seen), dim=3).flatten(2))
            summaries.append(left_v)
            level = self.merge(level, (q, k, v))
        weights = softmax(torch.stack(logits, dim=-1)).to(v.dtype)  # eq. 9: one normaliser
        out = weights[..., :1] * v
        for bit, left_v in enumerate(summaries):
            share = weights[..., 1 + bit, None].unflatten(2, (-1, 2 << bit))
            out = out + (share * left_v).flatten(2, 3)
        return out[:, :, :length]

    def merge(self, level: Spans, tokens: Spans) -> Spans:
        """The spans of the next level, each made of two; `tokens` are raw q, k, v."""
        q, k = (y.unflatten(2, (-1, 2)).amax(dim=3) for y in level[:2])
        raw_k, raw_v = (y.unflatten(2, (q.shape[2], -1)) for y in tokens[1:])
        return q, k, expectation(q, raw_k, raw_v)

    def state(self) -> tuple[StateTensor, ...]:
        """See Pattern."""
        stacks = [StateTensor(name, "stack", self.stack) for name in ("keys", "values", "queries")]
        raw = [StateTensor(name, "history", self.history) for name in ("raw_keys", "raw_values")]
        return (*stacks, *raw)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, place: Place, state: State
    ) -> tuple[Tensor, State]:
        """See Pattern."""
        out, keys, values = place.push(q, k, v, state["keys"], state["values"])
        return out, {
            "keys": keys,
            "values": values,
            "queries": push(state["queries"], q, place.lengths),
            "raw_keys": write(state["raw_keys"], k.transpose(1, 2), place.positions),
            "raw_values": write(state["raw_values"], v.transpose(1, 2), place.positions),
        }

    def fold(self, state: State) -> State:
        """See Pattern."""
        query = state["queries"].amax(dim=2)
        raw_k, raw_v = (state[name].transpose(1, 2) for name in ("raw_keys", "raw_values"))
        return {
            "keys": state["keys"].amax(dim=2, keepdim=True),
            "values": expectation(query, raw_k, raw_v).unsqueeze(2),
            "queries": query.unsqueeze(2),
        }


class HierarchicalLogsparse(Logsparse):
    """Our own variant, not in the paper: the value of a span mixes the values of its two halves.

    p(j|S) = p(j|half) p(half|S), as the paper remarks in section 3.1. Summaries merge, no raw
    tokens are kept, and state grows with log L. A model must be trained with this variant.
    """

    def merge(self, level: Spans, tokens: Spans) -> Spans:
        """See Logsparse."""
        q, k, v = (y.unflatten(2, (-1, 2)) for y in level)
        query = q.amax(dim=3)
        return query, k.amax(dim=3), expectation(query, k, v)

    def state(self) -> tuple[StateTensor, ...]:
        """See Pattern."""
        return super().state()[:3]

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, place: Place, state: State
    ) -> tuple[Tensor, State]:
        """See Pattern."""
        out, keys, values = place.push(q, k, v, state["keys"], state["values"])
        queries = push(state["queries"], q, place.lengths)
        return out, {"keys": keys, "values": values, "queries": queries}

    def fold(self, state: State) -> State:
        """See Pattern.

        The newest entry merges with the others one by one, newest first. If `a` is the logit of
        entry j and `b` that of what is merged so far, entry j gets the weight sigmoid(a - b), and
        every later merge (with a lower entry) scales it down. So the weights need no loop.
        """
        q, k, v = state["queries"], state["keys"], state["values"]  # [B, H, E, D]
        newer = future(q.shape[2], q.device).T[..., None]  # not part of the maximum of an entry
        query, key = (y.unsqueeze(2).masked_fill(newer, NEVER).amax(dim=3) for y in (q, k))
        ahead = ((query * k)[:, :, :-1] - query[:, :, :-1] * key[:, :, 1:]).sum(dim=-1)  # a - b
        left_alone = F.pad(F.logsigmoid(-ahead).cumsum(dim=-1), (1, 0))  # by all later merges
        taken = F.pad(F.logsigmoid(ahead), (0, 1))  # the merges begin with the newest entry
        weights = (left_alone + taken).exp().to(v.dtype)
        return {
            "keys": key[:, :, :1],
            "values": weights.unsqueeze(2) @ v,
            "queries": query[:, :, :1],
        }


def _most_bits(limit: int) -> int:
    """The largest number of set bits of any number below `limit`."""
    last = limit - 1
    lower = [(last >> bit << bit) - 1 for bit in range(last.bit_length()) if last >> bit & 1]
    return max(number.bit_count() for number in (last, *lower))
