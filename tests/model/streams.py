"""The decode cache of one layer, by the book: step and fold, for any pattern. For tests of model/.

It keeps its own account of lengths, schedules and slots, and shares no code with the server.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from model.attention import push_and_attend
from model.patterns.pattern import Pattern, Place


def entries_after(pattern: Pattern, pushed: int) -> int:
    """Valid entries of every stack after `pushed` tokens and the folds they made due."""
    keeps = {tensor.kept for tensor in pattern.state() if tensor.kind == "stack"}
    if pattern.schedule is not None and not pattern.schedule.binary:
        (kept,) = keeps or {1}
        sizes = [pattern.schedule.span] * (pushed // pattern.schedule.span)
        first, newest = pattern.schedule.keep_first, pattern.schedule.keep_newest
        folded = sizes[first : len(sizes) - newest]
        return pushed - sum(folded) + kept * len(folded)
    if pattern.schedule is None:
        return pushed
    return pushed.bit_count()


class Streams:
    """State of `rows` streams through one layer; whatever may not be read is kept full of NaN."""

    def __init__(self, pattern: Pattern, rows: int = 1, dtype: torch.dtype = torch.float64) -> None:
        self.pattern, self.tensors = pattern, pattern.state()
        self.state = {
            t.name: torch.full((rows, *t.shape), t.initial, dtype=dtype) for t in self.tensors
        }
        self.pushed = [0] * rows
        self._poison()

    def room(self, row: int) -> int:
        """Tokens that `row` takes before a fold is due."""
        schedule = self.pattern.schedule
        return schedule.span - self.pushed[row] % schedule.span if schedule else 1_000_000

    def push(self, rows: Sequence[int], q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        """Push T tokens onto each of `rows`, then fold what is due: `[rows, heads, T, D]`."""
        rows, count = list(rows), q.shape[2]
        assert all(count <= self.room(row) for row in rows)
        pushed = torch.tensor([self.pushed[row] for row in rows])
        lengths = torch.tensor([entries_after(self.pattern, self.pushed[r]) + count for r in rows])
        kernel = functools.partial(push_and_attend, lengths=lengths)
        place = Place(pushed[:, None] + torch.arange(count), lengths, kernel)
        given = {name: values[rows] for name, values in self.state.items()}
        out, changed = self.pattern.step(q, k, v, x, place, given)
        for name, values in changed.items():
            self.state[name][rows] = values
        for row in rows:
            self.pushed[row] += count
            self._fold(row)
        self._poison()
        return out

    def held(self, row: int) -> dict[str, Tensor]:
        """What `row` has to keep: stacks and histories cut to what is valid."""
        return {
            t.name: self.state[t.name][row, :, : entries_after(self.pattern, self.pushed[row])]
            if t.kind == "stack"
            else self.state[t.name][row, : self.pushed[row]]
            if t.kind == "history"
            else self.state[t.name][row]
            for t in self.tensors
        }

    def _fold(self, row: int) -> None:
        schedule, pushed = self.pattern.schedule, self.pushed[row]
        if schedule is None or pushed % schedule.span:
            return
        if pushed // schedule.span <= schedule.keep_first + schedule.keep_newest:
            return
        carries = (pushed & -pushed).bit_length() - 1
        entries = 1 + carries if schedule.binary else schedule.span * (1 + schedule.keep_newest)
        tokens = 1 << carries if schedule.binary else schedule.span
        end = entries_after(self.pattern, pushed - 1) + 1
        part = {
            "stack": (slice(None), slice(end - entries, end)),
            "history": (slice(pushed - tokens, pushed),),
            "recurrent": (),
        }
        given = {t.name: self.state[t.name][(row, *part[t.kind])][None] for t in self.tensors}
        changed = self.pattern.fold_at(given, torch.tensor([pushed]))
        for t in self.tensors:
            if t.name in changed:
                if t.kind == "stack":
                    left = changed[t.name][0]
                    self.state[t.name][row, :, end - entries :][:, : left.shape[1]] = left
                else:
                    self.state[t.name][(row, *part[t.kind])] = changed[t.name][0]

    def _poison(self) -> None:
        for row in range(len(self.pushed)):
            for t in self.tensors:
                if t.kind == "stack":
                    # The kernel masks dead entries, so they only have to be finite.
                    end = entries_after(self.pattern, self.pushed[row])
                    self.state[t.name][row, :, end:] = 1e4
                elif t.kind == "history":
                    self.state[t.name][row, self.pushed[row] :] = math.nan
