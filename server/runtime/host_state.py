"""The state of several streams in host memory: one NumPy buffer for each tensor, a row for each.

Rows are bound to the graphs by address and changed in place: nothing here costs O(context).
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
"""What the graphs put before the name of a state tensor that they give back."""


@dataclass(frozen=True)
class StateLength:
    """How long the state of a stream is."""

    entries: int
    """Valid entries of every stack."""
    tokens: int
    """Rows of every history."""


EMPTY = StateLength(0, 0)

FOLDED_BYTES = 8 << 20
"""Most bytes that are folded at once: about what the processor's caches hold."""
KEPT_BYTES = 4 * FOLDED_BYTES
"""Most bytes of memory for folding that are kept for the next fold."""


class HostRows:
    """`rows` rows of the state `tensors`."""

    device = "cpu"

    def __init__(self, tensors: Iterable[StateTensor], rows: int) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self.buffers: State = {
            t.name: np.full((rows, *t.shape), t.initial, t.element) for t in self._tensors.values()
        }
        self._layouts = {name: _layout(tensor) for name, tensor in self._tensors.items()}
        # In lines that are never cut: an entry of one head, a row of a history, all that is fixed.
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
        """Where a row begins; the next one follows it."""
        return self.buffers[name][row:].ctypes.data

    def fold(
        self,
        session: Any,
        rows: Sequence[int],
        begins: Sequence[StateLength],
        ends: Sequence[StateLength],
    ) -> None:
        """Run the fold graph of an onnxruntime `session` on what `rows` hold between lengths."""
        layouts = set(self._layouts.values())
        numbers = {layout: _numbers(*layout, rows, begins, ends) for layout in layouts}
        size = sum(
            numbers[self._layouts[value.name]][0].size * self._lines[value.name][0].nbytes
            for value in session.get_inputs()
        )
        together = max(1, FOLDED_BYTES // size)
        for first in range(0, len(rows), together):
            some = {layout: n[first : first + together] for layout, n in numbers.items()}
            self._fold(session, {name: some[layout] for name, layout in self._layouts.items()})
        if size > KEPT_BYTES:
            self._taken.clear()

    def _fold(self, session: Any, numbers: dict[str, Ints]) -> None:
        feeds = {v.name: self._take(v.name, numbers[v.name]) for v in session.get_inputs()}
        folded = session.run(None, feeds)
        for output, values in zip(session.get_outputs(), folded, strict=True):
            name = output.name.removeprefix(NEXT)
            at = numbers[name]
            if self._tensors[name].kind == StateKind.STACK:
                at = at[:, :, :1]  # the one entry that stands for the part
            self._lines[name][at] = values.reshape(*at.shape, -1)

    def _take(self, name: str, numbers: Ints) -> npt.NDArray[np.generic]:
        """The lines of those `numbers[B, heads, entries]`, as the graphs take them.

        In memory that is kept: what was given back to the system is slow to get again.
        """
        lines, taken = self._lines[name], self._taken.get(name)
        if taken is None or len(taken) < numbers.size:
            taken = self._taken[name] = np.empty((numbers.size, lines.shape[1]), lines.dtype)
        taken = taken[: numbers.size]
        lines.take(numbers.ravel(), axis=0, out=taken, mode="clip")  # others take a detour
        tensor, (batch, _, count) = self._tensors[name], numbers.shape
        shape = list(tensor.shape)
        if tensor.kind == StateKind.STACK:
            shape[1] = count
        elif tensor.kind == StateKind.HISTORY:
            shape[0] = count
        return taken.reshape(batch, *shape)

    def reset(self, row: int) -> None:
        """Give `row` the state of a stream that has not begun. What may not be read may stay."""
        for tensor in self._tensors.values():
            if tensor.kind == StateKind.RECURRENT:
                self.buffers[tensor.name][row] = tensor.initial

    def move(self, source: int, target: int, length: StateLength) -> None:
        """Copy a stream's state, which is as long as `length`, to another row."""
        for tensor in self._tensors.values():
            part = self._part(tensor, target, EMPTY, length)
            part[...] = self._part(tensor, source, EMPTY, length)

    def read(self, row: int, end: StateLength, begin: StateLength) -> State:
        """A copy of a stream's state between two lengths; recurrent tensors whole."""
        return {t.name: self._part(t, row, begin, end).copy() for t in self._tensors.values()}

    def write(self, row: int, end: StateLength, state: State) -> None:
        """Put those tensors of a state that is as long as `end` into `row`."""
        for name, values in state.items():
            self._part(self._tensors[name], row, EMPTY, end)[...] = values

    def _part(
        self, tensor: StateTensor, row: int, begin: StateLength, end: StateLength
    ) -> npt.NDArray[np.generic]:
        """A view of what a row holds between two lengths; of a recurrent tensor, all."""
        buffer: npt.NDArray[np.generic] = self.buffers[tensor.name][row]
        if tensor.kind == StateKind.STACK:
            return buffer[:, begin.entries : end.entries]
        if tensor.kind == StateKind.HISTORY:
            return buffer[begin.tokens : end.tokens]
        return buffer


_Layout = tuple[StateKind, int, int]
"""Kind of a tensor; of a row of it: how many stacks, and how many lines each."""


def _line(tensor: StateTensor) -> int:
    """Elements of one line."""
    _, stacks, length = _layout(tensor)
    return math.prod(tensor.shape) // (stacks * length)


def _layout(tensor: StateTensor) -> _Layout:
    match tensor.kind:
        case StateKind.STACK:
            return tensor.kind, tensor.shape[0], tensor.shape[1]
        case StateKind.HISTORY:
            return tensor.kind, 1, tensor.shape[0]
        case _:
            return tensor.kind, 1, 1


def _numbers(
    kind: StateKind,
    stacks: int,
    length: int,
    rows: Sequence[int],
    begins: Sequence[StateLength],
    ends: Sequence[StateLength],
) -> Ints:
    """Lines of what `rows` hold between lengths, `[B, stacks, lines]`."""
    match kind:
        case StateKind.STACK:
            first, count = [b.entries for b in begins], ends[0].entries - begins[0].entries
        case StateKind.HISTORY:
            first, count = [b.tokens for b in begins], ends[0].tokens - begins[0].tokens
        case _:
            first, count = [0] * len(rows), 1
    stack = np.array(rows)[:, None] * stacks + np.arange(stacks)
    begin: Ints = stack * length + np.array(first)[:, None]
    return begin[:, :, None] + np.arange(count)
