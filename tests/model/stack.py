"""The decode cache of one layer, by the book: push, attend, fold. For tests of the model."""

from __future__ import annotations

import torch
from torch import Tensor

from model.attention import attend, summarise

JUNK = 1e4  # what dead entries hold; attention masks them, so their weight is exactly zero


class Stack:
    """Stacks of `rows` streams, each `[heads, entries, dim]`; `span` None never folds."""

    def __init__(self, rows: int, heads: int, dim: int, length: int, span: int | None) -> None:
        self.span = span
        self.keys = torch.full((rows, heads, length, dim), JUNK, dtype=torch.float64)
        self.values = self.keys.clone()
        self.query_max = torch.full((rows, heads, dim), -torch.inf, dtype=torch.float64)
        self.lengths = torch.zeros(rows, dtype=torch.int64)
        self.pushed = torch.zeros(rows, dtype=torch.int64)

    def room(self, row: int) -> int:
        """Tokens that `row` takes before its block is full."""
        if self.span is None:
            return self.keys.shape[2] - int(self.pushed[row])
        return self.span - int(self.pushed[row]) % self.span

    def push(self, rows: list[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Push t tokens onto each of `rows`, attend, fold full blocks: `[rows, heads, t, dim]`."""
        for index, row in enumerate(rows):
            assert k.shape[2] <= self.room(row)
            first = int(self.lengths[row])
            self.keys[row, :, first : first + k.shape[2]] = k[index]
            self.values[row, :, first : first + k.shape[2]] = v[index]
            self.query_max[row] = self.query_max[row].maximum(q[index].amax(dim=1))
        self.lengths[rows] += k.shape[2]
        self.pushed[rows] += k.shape[2]
        out = attend(q, self.keys[rows], self.values[rows], self.lengths[rows])
        for row in rows:
            if self.span and self.pushed[row] % self.span == 0:
                self._fold(row, self.span)
        return out

    def state(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """What `row` holds: keys, values and the running query maximum."""
        length = int(self.lengths[row])
        return self.keys[row, :, :length], self.values[row, :, :length], self.query_max[row]

    def _fold(self, row: int, span: int) -> None:
        base = int(self.lengths[row]) - span
        block = slice(base, base + span)
        key, value = summarise(
            self.query_max[row], self.keys[row, :, block], self.values[row, :, block]
        )
        self.keys[row, :, block] = self.values[row, :, block] = JUNK
        self.keys[row, :, base], self.values[row, :, base] = key, value
        self.query_max[row] = -torch.inf
        self.lengths[row] = base + 1
