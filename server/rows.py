"""The state of several streams in host memory: one NumPy buffer for each tensor, a row for each.

Rows are bound to the graphs by address and changed in place: nothing here costs O(context).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from concertina.resources import ELEMENT_TYPES
from concertina.v1 import bundle_pb2 as pb

State = dict[str, npt.NDArray[np.generic]]
"""The state of one stream, stacks and histories cut to what is valid."""

NEXT = "next."
"""What the graphs put before the name of a state tensor that they give back."""


@dataclass(frozen=True)
class Extent:
    """How far the state of a stream reaches."""

    entries: int
    """Valid entries of every stack."""
    tokens: int
    """Rows of every history."""


NOTHING = Extent(0, 0)


class HostRows:
    """`rows` rows of the state `tensors`."""

    device = "cpu"

    def __init__(self, tensors: Iterable[pb.StateTensor], rows: int) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self.buffers: State = {
            t.name: np.full((rows, *t.shape), t.initial, ELEMENT_TYPES[t.data_type])
            for t in self._tensors.values()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def address(self, name: str, row: int) -> int:
        """Where a row begins; the next one follows it."""
        return self.buffers[name][row:].ctypes.data

    def fold(
        self, session: Any, rows: Sequence[int], begins: Sequence[Extent], ends: Sequence[Extent]
    ) -> None:
        """Run the fold graph of an onnxruntime `session` on what `rows` hold between extents."""
        parts = {
            name: [self._part(tensor, *place) for place in zip(rows, begins, ends, strict=True)]
            for name, tensor in self._tensors.items()
        }
        feeds = {v.name: np.stack(parts[v.name]) for v in session.get_inputs()}
        folded = session.run(None, feeds)
        names = [v.name.removeprefix(NEXT) for v in session.get_outputs()]
        for name, values in zip(names, folded, strict=True):
            for part, value in zip(parts[name], values, strict=True):
                if self._tensors[name].kind == pb.STATE_KIND_STACK:
                    part[:, :1] = value  # the one entry that stands for the part
                else:
                    part[...] = value

    def reset(self, row: int) -> None:
        """Give `row` the state of a stream that has not begun. What may not be read may stay."""
        for tensor in self._tensors.values():
            if tensor.kind == pb.STATE_KIND_RECURRENT:
                self.buffers[tensor.name][row] = tensor.initial

    def move(self, source: int, target: int, extent: Extent) -> None:
        """Copy a stream's state, which reaches as far as `extent`, to another row."""
        for tensor in self._tensors.values():
            part = self._part(tensor, target, NOTHING, extent)
            part[...] = self._part(tensor, source, NOTHING, extent)

    def read(self, row: int, end: Extent, begin: Extent) -> State:
        """A copy of a stream's state between two extents; recurrent tensors whole."""
        return {t.name: self._part(t, row, begin, end).copy() for t in self._tensors.values()}

    def write(self, row: int, end: Extent, state: State) -> None:
        """Put those tensors of a state that reaches as far as `end` into `row`."""
        for name, values in state.items():
            self._part(self._tensors[name], row, NOTHING, end)[...] = values

    def _part(
        self, tensor: pb.StateTensor, row: int, begin: Extent, end: Extent
    ) -> npt.NDArray[np.generic]:
        """A view of what a row holds between two extents; of a recurrent tensor, all."""
        buffer: npt.NDArray[np.generic] = self.buffers[tensor.name][row]
        if tensor.kind == pb.STATE_KIND_STACK:
            return buffer[:, begin.entries : end.entries]
        if tensor.kind == pb.STATE_KIND_HISTORY:
            return buffer[begin.tokens : end.tokens]
        return buffer
