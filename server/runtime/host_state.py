"""The state of several streams in host memory: a NumPy buffer per tensor, a row per stream.

Graphs are bound to the rows by address and change them in place, so that no step costs O(context).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from server.arrays import Ints, State
from server.bundles.state import StateKind, StateTensor

NEXT = "next."
"""Prefix of the names of the graphs' state outputs."""
TOKENS = "tokens"
"""Input of the fold graph: how many tokens each stream has."""


@dataclass(frozen=True)
class StateLength:
    """The length of a stream's state."""

    entries: int
    """Number of valid entries of each stack of which a fold keeps one entry a block."""
    tokens: int
    """Number of valid rows of each history, and of entries of each stack that never folds."""
    windowed: int = 0
    """Number of valid entries of each stack of which a fold keeps nothing."""

    def along(self, kind: StateKind, kept: int) -> int:
        """Entries or rows of a tensor of this kind; `kept`: see `StateTensor`."""
        if kind == StateKind.HISTORY:
            return self.tokens
        return {0: self.windowed, 1: self.entries}.get(kept, self.tokens)


EMPTY = StateLength(0, 0)

FOLDED_BYTES = 8 << 20
"""Largest number of bytes to fold at once: about the size of the processor's caches."""
KEPT_BYTES = 4 * FOLDED_BYTES
"""Largest fold input in bytes whose memory is kept for the next fold."""


class HostRows:
    """`rows` rows of the state `tensors` in host memory."""

    device = "cpu"

    def __init__(self, tensors: Iterable[StateTensor], rows: int) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self.buffers: State = {
            t.name: np.full((rows, *t.shape), t.initial, t.element) for t in self._tensors.values()
        }
        self._layouts = {name: _layout(tensor) for name, tensor in self._tensors.items()}
        # A line is the smallest unit that a fold takes: an entry of one head of a stack, a row of a
        # history, or a whole recurrent tensor.
        self._lines = {
            name: self.buffers[name].reshape(-1, _line(tensor))
            for name, tensor in self._tensors.items()
        }
        self._taken: State = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def address(self, name: str, row: int) -> int:
        """Memory address of a row. Rows are contiguous."""
        return self.buffers[name][row:].ctypes.data

    def fold(
        self,
        session: Any,
        rows: Sequence[int],
        begins: Sequence[StateLength],
        ends: Sequence[StateLength],
    ) -> None:
        """Fold the state of each of `rows` between two lengths, with the graph of `session`.

        An even number at once: the last of an odd number is folded twice, to the same values.
        """
        if len(rows) % 2:  # float products, too, sum the last of an odd number in another order
            rows, begins, ends = ([*each, each[-1]] for each in (rows, begins, ends))
        names = {v.name.removeprefix(NEXT) for v in (*session.get_inputs(), *session.get_outputs())}
        layouts = {layout for name, layout in self._layouts.items() if name in names}
        indices = {layout: _line_indices(*layout, rows, begins, ends) for layout in layouts}
        size = sum(
            indices[self._layouts[value.name]][0].size * self._lines[value.name][0].nbytes
            for value in session.get_inputs()
            if value.name != TOKENS
        )
        tokens = np.array([end.tokens for end in ends])
        together = max(2, FOLDED_BYTES // size // 2 * 2)
        for first in range(0, len(rows), together):
            some = {layout: n[first : first + together] for layout, n in indices.items()}
            at = {name: some[layout] for name, layout in self._layouts.items() if layout in some}
            self._fold(session, at, tokens[first : first + together])
        if size > KEPT_BYTES:
            self._taken.clear()

    def _fold(self, session: Any, indices: dict[str, Ints], tokens: Ints) -> None:
        feeds = {
            v.name: tokens if v.name == TOKENS else self._take(v.name, indices[v.name])
            for v in session.get_inputs()
        }
        folded = session.run(None, feeds)
        for output, values in zip(session.get_outputs(), folded, strict=True):
            name = output.name.removeprefix(NEXT)
            at = indices[name]
            if self._tensors[name].kind == StateKind.STACK:
                at = at[:, :, : values.shape[2]]  # a fold gives fewer entries than it takes
            self._lines[name][at] = values.reshape(*at.shape, -1)

    def _take(self, name: str, indices: Ints) -> npt.NDArray[np.generic]:
        """The lines at `indices[B, stacks, lines]`, in the shape of the graph's input.

        The memory is used again by later calls, since allocating it anew is slow.
        """
        lines, taken = self._lines[name], self._taken.get(name)
        if taken is None or len(taken) < indices.size:
            taken = self._taken[name] = np.empty((indices.size, lines.shape[1]), lines.dtype)
        taken = taken[: indices.size]
        lines.take(indices.ravel(), axis=0, out=taken, mode="clip")  # other modes make a copy
        tensor, (batch, _, count) = self._tensors[name], indices.shape
        shape = list(tensor.shape)
        if tensor.kind == StateKind.STACK:
            shape[1] = count
        elif tensor.kind == StateKind.HISTORY:
            shape[0] = count
        return taken.reshape(batch, *shape)

    def reset(self, row: int) -> None:
        """Give `row` the state of a new stream. Values that no graph reads may stay."""
        for tensor in self._tensors.values():
            if tensor.kind == StateKind.RECURRENT:
                self.buffers[tensor.name][row] = tensor.initial

    def move(self, source: int, target: int, length: StateLength) -> None:
        """Copy a state of the given length to another row."""
        for tensor in self._tensors.values():
            part = self._part(tensor, target, EMPTY, length)
            part[...] = self._part(tensor, source, EMPTY, length)

    def read(self, row: int, end: StateLength, begin: StateLength) -> State:
        """A copy of a row's state between two lengths. Recurrent tensors are complete."""
        return {t.name: self._part(t, row, begin, end).copy() for t in self._tensors.values()}

    def write(self, row: int, end: StateLength, state: State) -> None:
        """Write tensors of a state of length `end` into `row`."""
        for name, values in state.items():
            self._part(self._tensors[name], row, EMPTY, end)[...] = values

    def _part(
        self, tensor: StateTensor, row: int, begin: StateLength, end: StateLength
    ) -> npt.NDArray[np.generic]:
        """A view of a tensor's row between two lengths; of a recurrent tensor, the whole row."""
        buffer: npt.NDArray[np.generic] = self.buffers[tensor.name][row]
        if tensor.kind == StateKind.STACK:
            first, last = (at.along(tensor.kind, tensor.kept) for at in (begin, end))
            return buffer[:, first:last]
        if tensor.kind == StateKind.HISTORY:
            return buffer[begin.tokens : end.tokens]
        return buffer


_Layout = tuple[StateKind, int, int, int]
"""Kind of a tensor, number of stacks in a row of it, number of lines in a stack, and what is kept.
"""


def _line(tensor: StateTensor) -> int:
    """Number of elements of a line."""
    _, stacks, length, _ = _layout(tensor)
    return math.prod(tensor.shape) // (stacks * length)


def _layout(tensor: StateTensor) -> _Layout:
    match tensor.kind:
        case StateKind.STACK:
            return tensor.kind, tensor.shape[0], tensor.shape[1], tensor.kept
        case StateKind.HISTORY:
            return tensor.kind, 1, tensor.shape[0], 1
        case _:
            return tensor.kind, 1, 1, 1


def _line_indices(
    kind: StateKind,
    stacks: int,
    length: int,
    kept: int,
    rows: Sequence[int],
    begins: Sequence[StateLength],
    ends: Sequence[StateLength],
) -> Ints:
    """Indices of the lines of `rows` between two lengths, `[B, stacks, lines]`."""
    first, count = [0] * len(rows), 1
    if kind is not StateKind.RECURRENT:
        first = [begin.along(kind, kept) for begin in begins]
        count = ends[0].along(kind, kept) - first[0]
    stack = np.array(rows)[:, None] * stacks + np.arange(stacks)
    begin: Ints = stack * length + np.array(first)[:, None]
    return begin[:, :, None] + np.arange(count)
