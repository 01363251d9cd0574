"""The sparse patterns that the paper starts from, without summaries, as baselines.

A token attends to few earlier tokens, but each of them can be needed later, so a history keeps
them all. The sparse form of Fixed is in fixed.py, because it folds.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from model.attention import attend, future, in_blocks, read, softmax, write
from model.config import ModelConfig
from model.patterns.grid import Grid, attend_entries, attend_parts
from model.patterns.pattern import Pattern, Place, State, StateTensor, Support


class _Listed(Pattern):
    """Attends to a list of single tokens of the history."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.history = (config.context, config.heads, config.head_dim)

    @abstractmethod
    def listed(self, positions: Tensor) -> Tensor:
        """Tokens that each of `positions[B, T]` attends to, `[B, T, E]`; ignore those below 0."""

    def state(self) -> tuple[StateTensor, ...]:
        """See Pattern."""
        return tuple(StateTensor(name, "history", self.history) for name in ("keys", "values"))

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, place: Place, state: State
    ) -> tuple[Tensor, State]:
        """See Pattern."""
        keys = write(state["keys"], k.transpose(1, 2), place.positions)
        values = write(state["values"], v.transpose(1, 2), place.positions)
        listed = self.listed(place.positions)
        valid = listed >= 0
        listed = torch.where(valid, listed, place.positions[..., None])
        return attend(q, read(keys, listed), read(values, listed), valid), {
            "keys": keys,
            "values": values,
        }


class SparseLogsparse(_Listed):
    """The token itself and those 1, 2, 4, 8, … positions before it (Li et al. 2019)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.bits = (config.context - 1).bit_length()

    def support(self, position: int) -> Support:
        """See Pattern."""
        behind = (position - (1 << bit) for bit in reversed(range(self.bits)))
        return Support.of([*(j for j in behind if j >= 0), position])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """See Pattern."""
        length = q.shape[2]
        offsets = [0, *(1 << bit for bit in range((length - 1).bit_length()))]
        keys = [F.pad(k, (0, 0, offset, 0))[:, :, :length] for offset in offsets]
        logits = torch.stack([(q * key).sum(dim=-1) for key in keys], dim=-1)
        behind = torch.tensor(offsets, device=q.device)
        before_all = torch.arange(length, device=q.device)[:, None] < behind
        weights = softmax(logits.masked_fill(before_all, float("-inf"))).to(v.dtype)
        out = torch.zeros_like(v)
        for index, offset in enumerate(offsets):
            out = out + weights[..., index, None] * F.pad(v, (0, 0, offset, 0))[:, :, :length]
        return out

    def listed(self, positions: Tensor) -> Tensor:
        """See _Listed."""
        offsets = [0, *(1 << bit for bit in range(self.bits))]
        return positions[..., None] - torch.tensor(offsets, device=positions.device)


class SparseStrided(_Listed):
    """The last `span` tokens, itself included, and every span-th before (Child et al. 2019)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.span, self.blocks = config.span, config.blocks

    def support(self, position: int) -> Support:
        """See Pattern."""
        window = max(0, position - self.span + 1)
        strides = range(position % self.span, window, self.span)
        return Support.of([*strides, *range(window, position + 1)])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """See Pattern."""
        length, device = q.shape[2], q.device
        qb, kb, vb = (in_blocks(y, self.span) for y in (q, k, v))  # [B, H, n, s, D]
        before_k, before_v = (F.pad(y[:, :, :-1], (0, 0, 0, 0, 1, 0)) for y in (kb, vb))
        later = future(self.span, device)
        own = (qb @ kb.transpose(-1, -2)).masked_fill(later, float("-inf"))
        # Of the block before, the window has the tokens with a larger offset than the token's own.
        last = (qb @ before_k.transpose(-1, -2)).masked_fill(~later, float("-inf"))
        last[:, :, 0] = float("-inf")
        qc, kc, vc = (y.transpose(2, 3) for y in (qb, kb, vb))  # [B, H, s, n, D]
        rows = torch.arange(qb.shape[2], device=device)
        above = (qc @ kc.transpose(-1, -2)).masked_fill(rows >= rows[:, None], float("-inf"))
        logits = torch.cat((own, last, above.transpose(2, 3)), dim=-1)
        near, before, far = softmax(logits).to(v.dtype).split([self.span, self.span, len(rows)], -1)
        out: Tensor = near @ vb + before @ before_v + (far.transpose(2, 3) @ vc).transpose(2, 3)
        return out.flatten(2, 3)[:, :, :length]

    def listed(self, positions: Tensor) -> Tensor:
        """See _Listed."""
        near = torch.arange(self.span, device=positions.device)
        far = self.span * torch.arange(1, self.blocks, device=positions.device)
        return positions[..., None] - torch.cat((near, far))


class SparseAxial(Pattern):
    """The own row up to the token, and the own column above it (Ho et al. 2019)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.grid = Grid(config)

    def support(self, position: int) -> Support:
        """See Pattern."""
        return Support.of(self.grid.direct(position))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """See Pattern."""
        grids = (in_blocks(y, self.grid.width) for y in (q, k, v))
        return attend_parts(self.grid.parts(*grids), q.shape[2])

    def state(self) -> tuple[StateTensor, ...]:
        """See Pattern."""
        return self.grid.state()

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, place: Place, state: State
    ) -> tuple[Tensor, State]:
        """See Pattern."""
        raw = self.grid.push(k, v, place, state)
        row = self.grid.own_row(place.positions, raw["keys"], raw["values"])
        above = self.grid.above(place.positions, raw["keys"], raw["values"])
        return attend_entries(q, [row, above]), raw
