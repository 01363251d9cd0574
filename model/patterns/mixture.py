"""Combiner-Mixture: the vertical and the horizontal partition together.

`mixture`, as in the released code, has one softmax over both, so that it covers every token off the
axes twice. `mixture-averaged`, as the paper describes it, is the average of two attentions.
"""

from __future__ import annotations

from torch import Tensor

from model.attention import in_blocks
from model.config import ModelConfig
from model.patterns.grid import Grid, attend_entries, attend_parts
from model.patterns.horizontal import AxialHorizontal
from model.patterns.pattern import Pattern, Place, Schedule, State, StateTensor, Support
from model.patterns.vertical import AxialVertical


class Mixture(Pattern):
    """At most 2m + 3n entries; state of six vectors per token and six per column."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.schedule = Schedule(config.span)
        self.averaged = config.attention == "mixture-averaged"
        self.grid = Grid(config)
        self.vertical, self.horizontal = AxialVertical(config), AxialHorizontal(config)

    def support(self, position: int) -> Support:
        """See Pattern. Tokens off both axes are in two spans."""
        columns, sides = (p.support(position) for p in (self.vertical, self.horizontal))
        return Support.of(columns.direct, columns.spans + sides.spans)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """See Pattern."""
        q, k, v = (in_blocks(y, self.grid.width) for y in (q, k, v))
        direct, length = self.grid.parts(q, k, v), x.shape[1]
        columns, sides = self.vertical.summaries(q, k, v), self.horizontal.summaries(q, k, v)
        if self.averaged:
            return (
                attend_parts([*direct, columns], length) + attend_parts([*direct, *sides], length)
            ) / 2
        return attend_parts([*direct, columns, *sides], length)

    def state(self) -> tuple[StateTensor, ...]:
        """See Pattern."""
        return (
            *self.grid.state(),
            *self.vertical.summary_state(),
            *self.horizontal.summary_state(),
        )

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, place: Place, state: State
    ) -> tuple[Tensor, State]:
        """See Pattern."""
        positions = place.positions
        raw = self.grid.push(k, v, place, state)
        row = self.grid.own_row(positions, raw["keys"], raw["values"])
        above = self.grid.above(positions, raw["keys"], raw["values"])
        columns = self.vertical.summary_entries(positions, state)
        sides = self.horizontal.summary_entries(positions, state)
        if self.averaged:
            out = attend_entries(q, [row, above, columns]) + attend_entries(q, [row, above, *sides])
            out = out / 2
        else:
            out = attend_entries(q, [row, above, columns, *sides])
        live = self.vertical.go_live(q, k, v, above, positions, state)
        return out, {**raw, **live, **self.horizontal.open_row(q, positions, state)}

    def fold(self, state: State) -> State:
        """See Pattern."""
        return {**self.vertical.fold(state), **self.horizontal.fold(state)}
