"""Layers of a pretrained model with less to remember: what is old is folded, or dropped.

The first `sink` blocks and the newest `window` complete ones stay raw, besides the open one. Keys
and queries are turned by their positions before they come here. A summary is a mean of turned keys
and so is turned by about its tokens' positions: the kernel that decodes need not know of it.

Shapes: `G` heads of keys and values, each shared by `r` heads of queries; `n` blocks of `s` tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import NEVER, share_heads, softmax
from model.config import ModelConfig
from model.layers.architecture import Rope
from model.layers.positions import RotaryPositions, turn
from model.patterns.pattern import Pattern, Place, Schedule, State, StateTensor, Support

_TOGETHER = 256  # tokens whose attention is computed at once


class Windowed(Pattern):
    """Attends to the first blocks, the newest ones and the open one; of the others nothing stays.

    A fold drops the block that leaves the window.
    """

    kept = 0
    """Entries that are left of a block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        folding = config.architecture.folding
        assert folding is not None
        self.span, self.sink, self.window = config.span, folding.sink, folding.window
        self.heads, self.dim = config.kv_heads, config.head_dim
        self.schedule: Schedule = Schedule(config.span, False, folding.sink, folding.window)
        self.entries = self.schedule.most_entries(config.context, self.kept)

    def support(self, position: int) -> Support:
        """See Pattern."""
        own, s = position // self.span, self.span
        first = range(min(self.sink, max(0, own - self.window)) * s)
        return Support.of([*first, *range(max(0, own - self.window) * s, position + 1)])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """See Pattern."""
        return self._attend(q, k, v, k[:, :, :0], v[:, :, :0])

    def state(self) -> tuple[StateTensor, ...]:
        """See Pattern."""
        shape = (self.heads, self.entries, self.dim)
        names = ("keys", "values")
        return tuple(StateTensor(name, "stack", shape, kept=self.kept) for name in names)

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, place: Place, state: State
    ) -> tuple[Tensor, State]:
        """See Pattern."""
        out, keys, values = place.push(q, k, v, state["keys"], state["values"])
        return out, {"keys": keys, "values": values}

    def fold_at(self, state: State, tokens: Tensor) -> State:
        """See Pattern."""
        if not self.window:  # nothing is left to move
            return {}
        return {name: state[name][:, :, self.span :] for name in ("keys", "values")}

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, far_k: Tensor, far_v: Tensor) -> Tensor:
        length, step = q.shape[2], max(self.span, _TOGETHER // self.span * self.span)
        ends = [min(length, begin + step) for begin in range(0, length, step)]
        parts = [
            self.read(q, k, v, far_k, far_v, begin, end)
            for begin, end in zip(range(0, length, step), ends, strict=True)
        ]
        return torch.cat(parts, dim=2)

    def read(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        far_k: Tensor,
        far_v: Tensor,
        begin: int,
        end: int,
    ) -> Tensor:
        """What tokens `begin … end - 1` read: one softmax over raw tokens and summaries.

        far_k, far_v: summaries `[B, G, n, D]` of blocks behind the first ones, in turn.
        """
        span, device = self.span, q.device
        oldest = max(0, begin // span - self.window) * span
        columns = torch.cat(
            (
                torch.arange(min(self.sink * span, oldest), device=device),
                torch.arange(oldest, end, device=device),
            )
        )
        rows = torch.arange(begin, end, device=device)[:, None]
        raw = rows // span - self.window  # the first block of the window
        near = (columns <= rows) & ((columns // span < self.sink) | (columns // span >= raw))
        count = max(0, min(far_k.shape[2], (end - 1) // span - self.window - self.sink))
        far = self.sink + torch.arange(count, device=device) < raw
        keys = torch.cat((k[:, :, columns], far_k[:, :, :count]), 2)
        values = torch.cat((v[:, :, columns], far_v[:, :, :count]), 2)
        some = q[:, :, begin:end]
        return F.scaled_dot_product_attention(
            some,
            share_heads(some, keys),
            share_heads(some, values),
            attn_mask=torch.cat((near, far), 1),
            scale=1.0,
        )


class Folded(Windowed):
    """The same, but a block that leaves the window becomes one entry, its summary.

    Key and value are means of the block's, by the weights that the queries of the block give that
    is the newest when it leaves; these are pooled, as the queries of the block itself are no more.
    Heads of queries that share keys give the mean of their weights. With `max`, key and pooled
    query are maxima, as Combiner-Fixed has it. With `fitted`, a few learned numbers for each head
    of keys shape the weights and the result.
    """

    kept = 1

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        built = config.architecture
        assert built.folding is not None
        self.query_heads = config.heads
        self.summary = built.folding.summary
        self.rotary: RotaryPositions | None = None
        if self.summary != "fitted":
            return
        heads, dim = self.heads, self.dim
        if built.rope is not None:
            self.rotary = RotaryPositions(Rope(built.rope.frequencies))
        self.sharpness = nn.Parameter(torch.ones(heads, 1, 1, 1))
        """Factor of the logits that the pooled query gives."""
        self.of_key = nn.Parameter(torch.zeros(heads, 1, dim, 1))
        """What a key, turned back, gives to the logit of its token."""
        self.of_place = nn.Parameter(torch.zeros(heads, 1, self.span))
        """What the place in the block gives."""
        self.key_gain = nn.Parameter(torch.ones(heads, 1, dim))
        self.value_gain = nn.Parameter(torch.ones(heads, 1, dim))

    def support(self, position: int) -> Support:
        """See Pattern."""
        own, s = position // self.span, self.span
        blocks = [range(n * s, (n + 1) * s) for n in range(self.sink, own - self.window)]
        return Support.of(super().support(position).direct, blocks)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """See Pattern."""
        return self._attend(q, k, v, *self.summaries(q, k, v))

    def summaries(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, G, n, D]` of the n blocks that have left the window."""
        span, whole = self.span, q.shape[2] // self.span
        count = max(0, whole - self.sink - self.window)
        if not count:
            return k[:, :, :0], v[:, :, :0]
        first, last = self.sink * span, (self.sink + count) * span
        old_k, old_v = (y[:, :, first:last].unflatten(2, (count, span)) for y in (k, v))
        judging = q[:, :, first + self.window * span : last + self.window * span]
        pooled = self._pool(judging.unflatten(2, (count, span)), 3)
        return self.summarise(
            pooled, old_k, old_v, torch.arange(first, last, device=q.device)[None]
        )

    def summarise(
        self, pooled: Tensor, k: Tensor, v: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, G, n, D]` of blocks `[B, G, n, s, D]`.

        pooled: the queries that judge, `[B, G * r, n, D]`. positions: of the tokens, `[B, n * s]`;
        the batch may be 1.
        """
        by_group = pooled.unflatten(1, (self.heads, self.query_heads // self.heads))
        logits = (k.unsqueeze(2) @ by_group.unsqueeze(-1)).squeeze(-1)  # [B, G, r, n, s]
        if self.summary == "fitted":
            of_tokens = (self._unturned(k, positions) @ self.of_key).squeeze(-1) + self.of_place
            logits = logits * self.sharpness + of_tokens.unsqueeze(2)
        weights = softmax(logits).mean(2).to(v.dtype).unsqueeze(-2)  # [B, G, n, 1, s]
        value = (weights @ v).squeeze(-2)
        key = k.amax(-2) if self.summary == "max" else (weights @ k).squeeze(-2)
        if self.summary == "fitted":
            return key * self.key_gain, value * self.value_gain
        return key, value

    def state(self) -> tuple[StateTensor, ...]:
        """See Pattern."""
        shape = (self.query_heads, self.dim)
        return (*super().state(), StateTensor("pooled_query", "recurrent", shape, self._initial))

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, place: Place, state: State
    ) -> tuple[Tensor, State]:
        """See Pattern. Pooled are the queries of the open block; no fold resets them, as the first
        folds come late.
        """
        out, stacks = super().step(q, k, v, x, place, state)
        is_new = (place.positions[:, 0] % self.span == 0)[:, None, None]
        before = state["pooled_query"]
        before = torch.where(is_new, torch.full_like(before, self._initial), before)
        by_token = q.transpose(1, 2)  # the layout in memory, so that the graph copies nothing
        if self.summary == "max":
            pooled = torch.maximum(before, by_token.amax(1))
        else:
            pooled = before + by_token.sum(1) / self.span
        return out, {**stacks, "pooled_query": pooled}

    def fold_at(self, state: State, tokens: Tensor) -> State:
        """See Pattern."""
        keys, values, span = state["keys"], state["values"], self.span
        oldest = tokens[:, None] - (self.window + 1) * span + torch.arange(span, device=keys.device)
        summary = self.summarise(
            state["pooled_query"].unsqueeze(2),
            keys[:, :, None, :span],
            values[:, :, None, :span],
            oldest,
        )
        stacks = zip((keys, values), summary, strict=True)
        left = [torch.cat((made, stack[:, :, span:]), 2) for stack, made in stacks]
        return dict(zip(("keys", "values"), left, strict=True))

    @property
    def _initial(self) -> float:
        return NEVER if self.summary == "max" else 0.0

    def _pool(self, q: Tensor, dim: int) -> Tensor:
        return q.amax(dim) if self.summary == "max" else q.mean(dim)

    def _unturned(self, k: Tensor, positions: Tensor) -> Tensor:
        """Keys `[B, G, n, s, D]` as they were before their positions turned them."""
        if self.rotary is None:
            return k
        cosines, sines = self.rotary(positions)
        by_token = k.flatten(2, 3).transpose(1, 2)
        back: Tensor = turn(by_token, cosines, -sines).transpose(1, 2).unflatten(2, k.shape[2:4])
        return back
