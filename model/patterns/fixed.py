"""Combiner-Fixed: raw tokens of the open block, one summary for every earlier block.

arXiv 2107.05768, eq. 10, with block 0 included. Also here: its sparse parent, which has one token
instead of each summary, and its bidirectional form.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import NEVER, expectation, future, in_blocks, softmax
from model.config import ModelConfig
from model.patterns.pattern import Pattern, Place, Schedule, State, StateTensor, Support


class Fixed(Pattern):
    """Cost T (s + T/s), state 2 (s + L/s) + 1 vectors: both O(sqrt L) per token at s = sqrt(L).

    The key of a summary pools the block's keys; its value is the expectation for the pool of the
    block's queries. Pooling is by maximum, by mean, or by maximum after a learned layer with a ReLU
    (DeepSets; all heads share the layer, as in the reference's `deepset-max`).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.span, self.pooling = config.span, config.pooling
        self.schedule: Schedule | None = Schedule(config.span)
        self.heads, self.dim = config.heads, config.head_dim
        self.entries = config.blocks - 1 + min(config.span, config.context)
        if config.pooling == "deepset-max":
            self.of_queries = nn.Linear(self.dim, self.dim, bias=False)
            self.of_keys = nn.Linear(self.dim, self.dim, bias=False)

    def support(self, position: int) -> Support:
        """See Pattern."""
        own = position // self.span
        blocks = [range(r * self.span, (r + 1) * self.span) for r in range(own)]
        return Support.of(range(own * self.span, position + 1), blocks)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """See Pattern."""
        # The last block needs no summary, as no token follows it. Only this block has padding.
        qb, kb, vb = (in_blocks(y, self.span)[:, :, :-1] for y in (q, k, v))
        return attend_blocks(q, k, v, self.span, *self.summarise(qb, kb, vb))

    def summarise(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Key and value, `[…, D]`, of complete blocks `[…, s, D]`."""
        return self._pooled_key(k), expectation(self._pooled_query(q), k, v)

    def state(self) -> tuple[StateTensor, ...]:
        """See Pattern."""
        stack = (self.heads, self.entries, self.dim)
        initial = 0.0 if self.pooling == "mean" else NEVER
        return (
            StateTensor("keys", "stack", stack),
            StateTensor("values", "stack", stack),
            StateTensor("pooled_query", "recurrent", (self.heads, self.dim), initial),
        )

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, place: Place, state: State
    ) -> tuple[Tensor, State]:
        """See Pattern."""
        out, keys, values = place.push(q, k, v, state["keys"], state["values"])
        if self.pooling == "mean":
            pooled = state["pooled_query"] + q.sum(dim=2) / self.span
        else:
            by_token = q.transpose(1, 2)  # the layout in memory, so that the graph copies nothing
            pooled = torch.maximum(state["pooled_query"], self._pooled_query(by_token, dim=1))
        return out, {"keys": keys, "values": values, "pooled_query": pooled}

    def fold(self, state: State) -> State:
        """See Pattern."""
        keys, values, query = state["keys"], state["values"], state["pooled_query"]
        initial = 0.0 if self.pooling == "mean" else NEVER
        return {
            "keys": self._pooled_key(keys).unsqueeze(2),
            "values": expectation(query, keys, values).unsqueeze(2),
            "pooled_query": torch.full_like(query, initial),
        }

    def _pooled_query(self, q: Tensor, dim: int = -2) -> Tensor:
        if self.pooling == "mean":
            return q.mean(dim)
        return (F.relu(self.of_queries(q)) if self.pooling == "deepset-max" else q).amax(dim)

    def _pooled_key(self, k: Tensor) -> Tensor:
        if self.pooling == "mean":
            return k.mean(dim=-2)
        return (F.relu(self.of_keys(k)) if self.pooling == "deepset-max" else k).amax(dim=-2)


class SparseFixed(Pattern):
    """The sparse parent: own block, and the last token of every earlier block (Child et al. 2019).

    As many entries as Combiner-Fixed, but the other tokens of earlier blocks are never attended to.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.span = config.span
        self.schedule = Schedule(config.span)
        entries = config.blocks - 1 + min(config.span, config.context)
        self.stack = (config.heads, entries, config.head_dim)

    def support(self, position: int) -> Support:
        """See Pattern."""
        own = position // self.span * self.span
        return Support.of([*range(self.span - 1, own, self.span), *range(own, position + 1)])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """See Pattern."""
        last_k, last_v = (in_blocks(y, self.span)[:, :, :-1, -1] for y in (k, v))
        return attend_blocks(q, k, v, self.span, last_k, last_v)

    def state(self) -> tuple[StateTensor, ...]:
        """See Pattern."""
        return StateTensor("keys", "stack", self.stack), StateTensor("values", "stack", self.stack)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, place: Place, state: State
    ) -> tuple[Tensor, State]:
        """See Pattern."""
        out, keys, values = place.push(q, k, v, state["keys"], state["values"])
        return out, {"keys": keys, "values": values}

    def fold(self, state: State) -> State:
        """See Pattern."""
        return {name: state[name][:, :, -1:] for name in ("keys", "values")}


class BidirectionalFixed(Fixed):
    """Fixed for masked models: the whole own block, and a summary of every other block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.schedule = None
        self.length = config.context

    def support(self, position: int) -> Support:
        """See Pattern. The sequence is as long as the context."""
        own, s = position // self.span, self.span
        blocks = [range(r, min(r + s, self.length)) for r in range(0, self.length, s)]
        return Support.of(blocks[own], blocks[:own] + blocks[own + 1 :])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """See Pattern."""
        whole = (q.shape[2] - 1) // self.span * self.span
        summaries = [self.summarise(*(in_blocks(y[:, :, :whole], self.span) for y in (q, k, v)))]
        summaries += [self.summarise(*(y[:, :, None, whole:] for y in (q, k, v)))]
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*summaries, strict=True))
        return attend_blocks(q, k, v, self.span, keys, values, causal=False)

    def state(self) -> tuple[StateTensor, ...]:
        """See Pattern."""
        raise ValueError(
            "fixed-bidirectional attends to later tokens, so it cannot decode token by token: "
            "export a causal pattern"
        )


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: int,
    far_k: Tensor,
    far_v: Tensor,
    causal: bool = True,
) -> Tensor:
    """One softmax over the own block and one entry for each other block, `[B, H, T, D]`.

    far_k, far_v: the entries of the blocks, `[B, H, blocks, D]`; if causal, the last block needs
    none. causal: attend only to the own block up to the token, and to earlier blocks.
    """
    qb, kb, vb = (in_blocks(y, span) for y in (q, k, v))
    blocks, device = qb.shape[2], q.device
    own, far = torch.arange(blocks, device=device), torch.arange(far_k.shape[2], device=device)
    near = qb @ kb.transpose(-1, -2)  # [B, H, n, s, s]
    if causal:
        near = near.masked_fill(future(span, device), float("-inf"))
        unseen = far >= own[:, None]
    else:
        padding = torch.arange(blocks * span, device=device).view(blocks, 1, span) >= q.shape[2]
        near = near.masked_fill(padding, float("-inf"))
        unseen = far == own[:, None]
    distant = (qb.flatten(2, 3) @ far_k.transpose(-1, -2)).unflatten(2, (blocks, span))
    distant = distant.masked_fill(unseen[:, None], float("-inf"))  # [B, H, n, s, far]
    weights = softmax(torch.cat((near, distant), dim=-1)).to(v.dtype)  # eq. 9: one normaliser
    out = (weights[..., :span] @ vb).flatten(2, 3)
    out = out + weights[..., span:].flatten(2, 3) @ far_v
    return out[:, :, : q.shape[2]]
