"""Combiner-Axial, row-major: raw tokens of the own row, one entry for every earlier row.

Unlike in Fixed, the entry of an earlier row depends on the column of the token that reads it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.attention import future, in_blocks, softmax, write
from model.config import ModelConfig
from model.patterns.grid import (
    Grid,
    along_columns,
    along_rows,
    attend_entries,
    attend_parts,
)
from model.patterns.pattern import Pattern, Place, Schedule, State, StateTensor, Support


class AxialRowMajor(Pattern):
    """Entries O(m + n), state one entry per token; the `axial` of the released reference code.

    The entry for a token of a finished row has as value `G` the attention of that token to its
    whole row, and as key `K2` a projection computed from `G`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.schedule = Schedule(config.span)
        self.grid = Grid(config)
        self.inputs = (config.span, config.width)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.norm = nn.LayerNorm(config.width)
        self.key = nn.Linear(config.width, config.width, bias=False)

    def support(self, position: int) -> Support:
        """See Pattern."""
        begin, width = position // self.grid.width * self.grid.width, self.grid.width
        rows = [range(r, r + width) for r in range(0, begin, width)]
        return Support.of(range(begin, position + 1), rows)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """See Pattern."""
        length, width = q.shape[2], self.grid.width
        q, k, v = (in_blocks(y, width) for y in (q, k, v))
        x = in_blocks(x.unsqueeze(1), width).squeeze(1)  # [B, n, m, width]
        keys, values = self.summarise(q, k, v, x)
        rows = torch.arange(q.shape[2], device=q.device)
        parts = [
            along_rows(q, k, v, future(width, q.device)),
            along_columns(q, keys, values, rows >= rows[:, None, None]),
        ]
        return attend_parts(parts, length)

    def summarise(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """K2 and G, `[B, H, n, m, D]`, of complete rows; `x` is `[B, n, m, width]`."""
        values = softmax(q @ k.transpose(-1, -2)).to(v.dtype) @ v
        joined = values.permute(0, 2, 3, 1, 4).flatten(3)
        keys = self.key(self.norm(x + self.out(joined)))
        return keys.unflatten(3, (q.shape[1], -1)).permute(0, 3, 1, 2, 4), values

    def state(self) -> tuple[StateTensor, ...]:
        """See Pattern."""
        queries = (self.grid.width, self.grid.heads, self.grid.dim)
        return (
            *self.grid.state(),
            StateTensor("queries", "recurrent", queries),
            StateTensor("inputs", "recurrent", self.inputs),
        )

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, place: Place, state: State
    ) -> tuple[Tensor, State]:
        """See Pattern."""
        grid, positions = self.grid, place.positions
        raw = grid.push(k, v, place, state)
        row = grid.own_row(positions, raw["keys"], raw["values"])
        above = grid.above(positions, raw["keys"], raw["values"])  # K2 and G, after the fold
        return attend_entries(q, [row, above]), {
            **raw,
            "queries": write(state["queries"], q.transpose(1, 2), positions % grid.width),
            "inputs": write(state["inputs"], x, positions % grid.width),
        }

    def fold(self, state: State) -> State:
        """See Pattern."""
        q, k, v = (
            state[name].transpose(1, 2).unsqueeze(2) for name in ("queries", "keys", "values")
        )
        keys, values = self.summarise(q, k, v, state["inputs"].unsqueeze(1))
        return {
            "keys": keys.squeeze(2).transpose(1, 2),
            "values": values.squeeze(2).transpose(1, 2),
        }
