"""Combiner-Axial, horizontal: raw tokens on both axes, two summaries of every earlier row.

One summary is of the tokens left of the reading token's column, the other of the tokens right of
it, as in the released mixture.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.attention import in_blocks, write
from model.config import ModelConfig
from model.patterns.grid import (
    Entries,
    Grid,
    Part,
    along_columns,
    attend_entries,
    attend_parts,
    summaries_of_earlier,
)
from model.patterns.pattern import Pattern, Place, Schedule, State, StateTensor, Support

_SIDES = ("left_keys", "left_values", "right_keys", "right_values")


class AxialHorizontal(Pattern):
    """At most m + 3n entries; state of six vectors per token, thrice that of full attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.schedule = Schedule(config.span)
        self.grid = Grid(config)

    def support(self, position: int) -> Support:
        """See Pattern."""
        width, column = self.grid.width, position % self.grid.width
        rows = range(0, position - column, width)
        sides = [
            side
            for begin in rows
            for side in (
                range(begin, begin + column),
                range(begin + column + 1, begin + width),
            )
        ]
        return Support.of(self.grid.direct(position), sides)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """See Pattern."""
        q, k, v = (in_blocks(y, self.grid.width) for y in (q, k, v))
        return attend_parts([*self.grid.parts(q, k, v), *self.summaries(q, k, v)], x.shape[1])

    def summaries(self, q: Tensor, k: Tensor, v: Tensor) -> list[Part]:
        """Summaries of both sides of all earlier rows, in the parallel forward."""
        rows = torch.arange(q.shape[2], device=q.device)
        columns = torch.arange(self.grid.width, device=q.device)[:, None]
        later = rows >= rows[:, None, None]  # [n, 1, n]
        left, right = _sides(q, k, v)
        return [
            along_columns(q, *left, later | (columns == 0)),
            along_columns(q, *right, later | (columns == self.grid.width - 1)),
        ]

    def state(self) -> tuple[StateTensor, ...]:
        """See Pattern."""
        return *self.grid.state(), *self.summary_state()

    def summary_state(self) -> tuple[StateTensor, ...]:
        """Both summaries for every token of the finished rows, and the queries of the open row."""
        queries = (self.grid.width, self.grid.heads, self.grid.dim)
        return (
            *(StateTensor(name, "history", self.grid.history) for name in _SIDES),
            StateTensor("queries", "recurrent", queries),
        )

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, place: Place, state: State
    ) -> tuple[Tensor, State]:
        """See Pattern."""
        raw = self.grid.push(k, v, place, state)
        row = self.grid.own_row(place.positions, raw["keys"], raw["values"])
        above = self.grid.above(place.positions, raw["keys"], raw["values"])
        out = attend_entries(q, [row, above, *self.summary_entries(place.positions, state)])
        return out, {**raw, **self.open_row(q, place.positions, state)}

    def summary_entries(self, positions: Tensor, state: State) -> list[Entries]:
        """Summaries of both sides of all earlier rows, in a decode step."""
        column = positions[..., None] % self.grid.width
        left = self.grid.above(positions, state["left_keys"], state["left_values"])
        right = self.grid.above(positions, state["right_keys"], state["right_values"])
        return [
            Entries(left.keys, left.values, left.valid & (column > 0)),
            Entries(right.keys, right.values, right.valid & (column < self.grid.width - 1)),
        ]

    def open_row(self, q: Tensor, positions: Tensor, state: State) -> State:
        """Queries of the open row, for its summaries later, and zeros in place of the summaries.

        Without the zeros, a copy of the state would contain data of another stream.
        """
        q = q.transpose(1, 2)
        empty = {name: write(state[name], torch.zeros_like(q), positions) for name in _SIDES}
        return {"queries": write(state["queries"], q, positions % self.grid.width), **empty}

    def fold(self, state: State) -> State:
        """See Pattern."""
        row = (state[name].transpose(1, 2) for name in ("queries", "keys", "values"))
        left, right = _sides(*row)
        return {
            name: side.transpose(1, 2) for name, side in zip(_SIDES, (*left, *right), strict=True)
        }


def _sides(q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Summaries (keys and values `[…, m, D]`) of what is left and right of each token of a row."""
    keys, values = summaries_of_earlier(*(y.flip(-2) for y in (q, k, v)))
    return summaries_of_earlier(q, k, v), (keys.flip(-2), values.flip(-2))
