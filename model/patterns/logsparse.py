"""Combiner-Logsparse, exact and hierarchical: one entry per set bit of the position.

A token at position i attends to itself and to the spans of the binary decomposition of i: for every
set bit l, the 2^l tokens that begin where the bits above l say (a Fenwick tree; combiner.md 3.2).
As a cache that is a stack which folds like a binary counter counts.
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
    """The paper's function: a span's value is the expectation over all of its tokens.

    A parent's value does not follow from its children's, so the raw keys and values stay in a
    history: state grows with L, the entries attended with log L.
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
            # Of two neighbours the left one is read, by every token of the right one.
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
        """The spans of the next level, each of two neighbours; `tokens` are the raw ones."""
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
    """Our own variant, not the paper's function: a span's value mixes those of its two halves.

    p(j|S) = p(j|half) p(half|S), by the paper's remark in 3.1 (combiner.md 1.8 and 3.3). Summaries
    merge, nothing raw is kept, and state grows with log L. It has to be trained as such.
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

        The newest entry swallows the others one by one, newest first. With `a` the logit of entry
        j and `b` that of what was swallowed before it, entry j enters with weight sigmoid(a - b),
        and every later, that is lower, merge scales it down. So nothing has to be done in turn.
        """
        q, k, v = state["queries"], state["keys"], state["values"]  # [B, H, E, D]
        newer = future(q.shape[2], q.device).T[..., None]  # not to be in an entry's own maximum
        query, key = (y.unsqueeze(2).masked_fill(newer, NEVER).amax(dim=3) for y in (q, k))
        ahead = ((query * k)[:, :, :-1] - query[:, :, :-1] * key[:, :, 1:]).sum(dim=-1)  # a - b
        left_alone = F.pad(F.logsigmoid(-ahead).cumsum(dim=-1), (1, 0))  # by all lower merges
        taken = F.pad(F.logsigmoid(ahead), (0, 1))  # the newest entry is there from the start
        weights = (left_alone + taken).exp().to(v.dtype)
        return {
            "keys": key[:, :, :1],
            "values": weights.unsqueeze(2) @ v,
            "queries": query[:, :, :1],
        }


def _most_bits(limit: int) -> int:
    """The most set bits that any number below `limit` has."""
    last = limit - 1
    lower = [(last >> bit << bit) - 1 for bit in range(last.bit_length()) if last >> bit & 1]
    return max(number.bit_count() for number in (last, *lower))
