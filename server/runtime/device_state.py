"""The state of several streams in the memory of a device, which NumPy cannot access.

Two graphs of the bundle copy parts of rows out and in (`export/moves.py`), so that joins, moves and
folds stay on the device. The host sends only indices, and state when a stream is restored. It reads
state only when a stream is saved or a block enters the prefix cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from server.arrays import State
from server.bundles.state import StateKind, StateTensor
from server.runtime.host_state import EMPTY, NEXT, TOKENS, StateLength

_PART = "part."

Parts = dict[str, Any]
"""Parts of rows by tensor name, `[B, …]`: on the device, or as an array to send there."""


class DeviceRows:
    """`rows` rows of the state `tensors` on `device`; `take` and `put` run the bundle's graphs."""

    def __init__(
        self,
        tensors: Iterable[StateTensor],
        rows: int,
        device: str,
        take: ort.InferenceSession,
        put: ort.InferenceSession,
    ) -> None:
        self.device = device
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._take_session, self._put_session = take, put
        # Zeros, since a kernel may multiply an unused entry by 0, and new memory may hold NaN.
        self._buffers = {
            t.name: ort.OrtValue.ortvalue_from_numpy(
                np.zeros((rows, *t.shape), t.element), device, 0
            )
            for t in self._tensors.values()
        }
        self._row_bytes = {
            name: buffer.tensor_size_in_bytes() // rows for name, buffer in self._buffers.items()
        }
        self.nbytes = rows * sum(self._row_bytes.values())
        """Bytes of all buffers."""

    def address(self, name: str, row: int) -> int:
        """Device address of a row. Rows are contiguous."""
        begin: int = self._buffers[name].data_ptr()
        return begin + row * int(self._row_bytes[name])

    def fold(
        self,
        session: ort.InferenceSession,
        rows: Sequence[int],
        begins: Sequence[StateLength],
        ends: Sequence[StateLength],
    ) -> None:
        """See HostRows."""
        parts = self._take(rows, begins, ends)
        io = session.io_binding()
        for value in session.get_inputs():
            if value.name == TOKENS:
                io.bind_cpu_input(TOKENS, np.array([end.tokens for end in ends]))
            else:
                io.bind_ortvalue_input(value.name, parts[value.name])
        folded = self._run(session, io, NEXT)
        parts |= folded
        # Of a stack fewer entries are left, of a history as many rows as before.
        left = {
            tensor.kept: folded[name].shape()[2]
            for name, tensor in self._tensors.items()
            if tensor.kind == StateKind.STACK and name in folded
        }
        places = [
            StateLength(
                begin.entries + left.get(1, end.entries - begin.entries),
                end.tokens,
                begin.windowed + left.get(0, end.windowed - begin.windowed),
            )
            for begin, end in zip(begins, ends, strict=True)
        ]
        self._put(rows, begins, places, parts)

    def reset(self, row: int) -> None:
        """See HostRows."""
        initial: State = {
            t.name: np.full(t.shape, t.initial, t.element)
            for t in self._tensors.values()
            if t.kind == StateKind.RECURRENT
        }
        self.write(row, EMPTY, initial)

    def move(self, source: int, target: int, length: StateLength) -> None:
        """See HostRows."""
        parts = self._take([source], [EMPTY], [length])
        self._put([target], [EMPTY], [length], parts)

    def read(self, row: int, end: StateLength, begin: StateLength) -> State:
        """See HostRows. Copies to the host."""
        state: State = {}
        for name, part in self._take([row], [begin], [end]).items():
            values, tensor = part.numpy()[0], self._tensors[name]
            if tensor.kind != StateKind.RECURRENT:
                first, last = (at.along(tensor.kind, tensor.kept) for at in (begin, end))
                stack = tensor.kind == StateKind.STACK
                values = values[:, : last - first] if stack else values[: last - first]
            state[name] = values.copy()
        return state

    def write(self, row: int, end: StateLength, state: State) -> None:
        """See HostRows. Copies from the host. Tensors that `state` lacks keep their values."""
        parts = self._take([row], [EMPTY], [end])
        for name, values in state.items():
            if values.size:
                element = self._tensors[name].element
                parts[name] = np.ascontiguousarray(values[None], element)
        self._put([row], [EMPTY], [end], parts)

    def _take(
        self, rows: Sequence[int], begins: Sequence[StateLength], ends: Sequence[StateLength]
    ) -> Parts:
        io = self._bind(self._take_session, rows, begins, ends)
        return self._run(self._take_session, io, _PART)

    def _put(
        self,
        rows: Sequence[int],
        begins: Sequence[StateLength],
        ends: Sequence[StateLength],
        parts: Parts,
    ) -> None:
        io = self._bind(self._put_session, rows, begins, ends)
        for name, part in parts.items():
            if isinstance(part, np.ndarray):
                io.bind_cpu_input(_PART + name, part)
            else:
                io.bind_ortvalue_input(_PART + name, part)
        for name, buffer in self._buffers.items():
            io.bind_ortvalue_output(NEXT + name, buffer)
        self._put_session.run_with_iobinding(io)

    def _bind(
        self,
        session: ort.InferenceSession,
        rows: Sequence[int],
        begins: Sequence[StateLength],
        ends: Sequence[StateLength],
    ) -> ort.IOBinding:
        places = list(zip(begins, ends, strict=True))
        index = {
            "rows": np.array(rows, np.int64),
            "tokens": _indices((begin.tokens, end.tokens) for begin, end in places),
        }
        for kept in {tensor.kept for tensor in self._tensors.values()}:
            along = StateKind.STACK, kept
            spans = ((begin.along(*along), end.along(*along)) for begin, end in places)
            index["entries" if kept == 1 else f"entries.{kept}"] = _indices(spans)
        io = session.io_binding()
        for value in session.get_inputs():
            if value.name in index:
                io.bind_cpu_input(value.name, index[value.name])
            elif value.name in self._buffers:
                io.bind_ortvalue_input(value.name, self._buffers[value.name])
        return io

    def _run(self, session: ort.InferenceSession, io: ort.IOBinding, prefix: str) -> Parts:
        """Run the bound graph. Its outputs stay on the device, by name without `prefix`."""
        names = [value.name for value in session.get_outputs()]
        for name in names:
            io.bind_output(name, self.device)
        session.run_with_iobinding(io)
        values = zip(names, io.get_outputs(), strict=True)
        return {name.removeprefix(prefix): value for name, value in values}


def _indices(spans: Iterable[tuple[int, int]]) -> npt.NDArray[np.int64]:
    """The indices of each span, `[B, n]`. At least one: not every kernel takes an empty input."""
    return np.stack([np.arange(begin, max(end, begin + 1)) for begin, end in spans])
