"""Combiner-Axial, vertical: raw tokens on both axes, one summary of every other column above."""

from __future__ import annotations

import torch
from torch import Tensor

from model.attention import NEVER, attend, in_blocks, read, write
from model.config import ModelConfig
from model.patterns.grid import (
    Entries,
    Grid,
    Part,
    along_rows,
    attend_entries,
    attend_parts,
    summaries_of_earlier,
)
from model.patterns.pattern import Pattern, Place, Schedule, State, StateTensor, Support


class AxialVertical(Pattern):
    """At most 2m + n entries; state of two vectors per token and five per column.

    Every row changes the summary of a column, but the tokens of the open row must not see that. So
    the `live` tensors include the open row, and are copied to the `column` tensors, which tokens
    read, when the row is complete.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.schedule = Schedule(config.span)
        self.grid = Grid(config)

    def support(self, position: int) -> Support:
        """See Pattern."""
        width, column = self.grid.width, position % self.grid.width
        begin = position - column
        columns = [range(c, begin, width) for c in range(width) if c != column]
        return Support.of(self.grid.direct(position), columns)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """See Pattern."""
        q, k, v = (in_blocks(y, self.grid.width) for y in (q, k, v))
        return attend_parts([*self.grid.parts(q, k, v), self.summaries(q, k, v)], x.shape[1])

    def summaries(self, q: Tensor, k: Tensor, v: Tensor) -> Part:
        """Summaries of the other columns, in the parallel forward."""
        keys, values = summaries_of_earlier(*(y.transpose(2, 3) for y in (q, k, v)))
        own = torch.eye(self.grid.width, dtype=torch.bool, device=q.device)
        first = (torch.arange(q.shape[2], device=q.device) == 0)[:, None, None]
        return along_rows(q, keys.transpose(2, 3), values.transpose(2, 3), own | first)

    def state(self) -> tuple[StateTensor, ...]:
        """See Pattern."""
        return *self.grid.state(), *self.summary_state()

    def summary_state(self) -> tuple[StateTensor, ...]:
        """One row of each tensor per column."""
        line = (self.grid.width, self.grid.heads, self.grid.dim)
        return (
            StateTensor("live_queries", "recurrent", line, NEVER),
            StateTensor("live_keys", "recurrent", line, NEVER),
            StateTensor("live_values", "recurrent", line),
            StateTensor("column_keys", "recurrent", line),
            StateTensor("column_values", "recurrent", line),
        )

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, place: Place, state: State
    ) -> tuple[Tensor, State]:
        """See Pattern."""
        raw = self.grid.push(k, v, place, state)
        row = self.grid.own_row(place.positions, raw["keys"], raw["values"])
        above = self.grid.above(place.positions, raw["keys"], raw["values"])
        out = attend_entries(q, [row, above, self.summary_entries(place.positions, state)])
        return out, {**raw, **self.go_live(q, k, v, above, place.positions, state)}

    def summary_entries(self, positions: Tensor, state: State) -> Entries:
        """Summaries of the other columns, as of the start of the row, in a decode step."""
        width = self.grid.width
        others = torch.arange(width, device=positions.device) != positions[..., None] % width
        valid = others & (positions[..., None] >= width)
        shape = (-1, positions.shape[1], -1, -1, -1)
        keys, values = (state[f"column_{name}"].unsqueeze(1) for name in ("keys", "values"))
        return Entries(keys.expand(shape), values.expand(shape), valid)

    def go_live(
        self, q: Tensor, k: Tensor, v: Tensor, above: Entries, positions: Tensor, state: State
    ) -> State:
        """The live summaries of the columns, with each token added to its own column."""
        columns = positions % self.grid.width
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # [B, T, H, D]
        query, key = (
            torch.maximum(read(state[f"live_{name}"], columns[..., None]).squeeze(2), new)
            for name, new in (("queries", q), ("keys", k))
        )
        value = attend(
            query.transpose(1, 2),
            torch.cat((above.keys, k.unsqueeze(2)), dim=2),
            torch.cat((above.values, v.unsqueeze(2)), dim=2),
            torch.cat((above.valid, positions[..., None] >= 0), dim=2),
        )
        return {
            "live_queries": write(state["live_queries"], query, columns),
            "live_keys": write(state["live_keys"], key, columns),
            "live_values": write(state["live_values"], value.transpose(1, 2), columns),
        }

    def fold(self, state: State) -> State:
        """See Pattern."""
        return {f"column_{name}": state[f"live_{name}"] for name in ("keys", "values")}
