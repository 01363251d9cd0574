"""The only door to onnxruntime: sessions, state buffers, and the two passes over them.

Buffers hold one row per slot, bound once and changed in place: nothing here costs O(context).
Shapes: `B` streams, `T` tokens, `H` heads, `E` entries, `D` head_dim, `s` span.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from concertina.v1 import bundle_pb2 as pb
from server.bundle import Bundle
from server.errors import BundleError

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
State = dict[str, npt.NDArray[np.generic]]
"""The state of one stream, stacks cut to their valid entries."""

_DTYPES: dict[int, type[np.generic]] = {
    pb.DATA_TYPE_FLOAT32: np.float32,
    pb.DATA_TYPE_FLOAT16: np.float16,
}


class Runtime:
    """Runs the graphs of one bundle over `rows` streams' state. Rows are plain indices."""

    def __init__(self, bundle: Bundle, rows: int, threads: int = 0) -> None:
        self._tensors = list(bundle.manifest.state)
        self._span = bundle.span
        self._step_session = _load(bundle.step_path, threads)
        self._fold_session = _load(bundle.fold_path, 1) if bundle.span else None
        self._buffers = {
            t.name: np.full((rows, *t.shape), t.initial, _DTYPES[t.data_type])
            for t in self._tensors
        }
        self._steps: dict[tuple[int, int], _Binding] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all state buffers."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def step(self, tokens: Ints, positions: Ints, lengths: Ints) -> Floats:
        """One token for each of the first B rows: `[B]`, `[B]`, `[B]` to logits `[B, vocabulary]`.

        `lengths` counts the valid entries before the push. The result is only valid until the next
        call.
        """
        batch = len(tokens)
        binding = self._steps.get((0, batch))
        if binding is None:
            binding = self._steps[0, batch] = self._bind(0, batch)
        return binding.run(tokens[:, None], positions[:, None], lengths + 1, np.arange(batch))

    def prefill(
        self, row: int, tokens: Ints, position: int, length: int, logits: bool = False
    ) -> Floats:
        """Push `tokens[T]` onto one row, beginning at absolute `position`, behind `length` entries.

        They must not reach beyond the open block. Returns `[T, vocabulary]` if `logits` are asked
        for, else `[0, vocabulary]`.
        """
        binding = self._steps.get((row, 1))
        if binding is None:
            binding = self._steps[row, 1] = self._bind(row, 1)
        time = len(tokens)
        return binding.run(
            tokens[None],
            np.arange(position, position + time)[None],
            np.array([length + time]),
            np.arange(time if logits else 0),
        )

    def fold(self, rows: Sequence[int], bases: Sequence[int]) -> None:
        """Replace, in each of `rows`, the span entries from its base on by one summary."""
        assert self._fold_session is not None and self._span is not None
        feeds = {}
        for tensor in self._tensors:
            buffer = self._buffers[tensor.name]
            if tensor.kind == pb.STATE_KIND_STACK:
                blocks = [
                    buffer[row, :, base : base + self._span]
                    for row, base in zip(rows, bases, strict=True)
                ]
                feeds[tensor.name] = np.stack(blocks)  # [B, H, s, D]
            else:
                feeds[tensor.name] = buffer[list(rows)]
        folded = self._fold_session.run([f"next.{t.name}" for t in self._tensors], feeds)
        for tensor, values in zip(self._tensors, folded, strict=True):
            buffer = self._buffers[tensor.name]
            for index, (row, base) in enumerate(zip(rows, bases, strict=True)):
                if tensor.kind == pb.STATE_KIND_STACK:
                    buffer[row, :, base] = values[index, :, 0]
                else:
                    buffer[row] = values[index]

    def reset(self, row: int) -> None:
        """Give `row` the state of a stream that has not begun. Dead stack entries may stay."""
        for tensor in self._tensors:
            if tensor.kind != pb.STATE_KIND_STACK:
                self._buffers[tensor.name][row] = tensor.initial

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the state of a stream with `length` valid entries to another row."""
        for tensor in self._tensors:
            buffer = self._buffers[tensor.name]
            if tensor.kind == pb.STATE_KIND_STACK:
                buffer[target, :, :length] = buffer[source, :, :length]
            else:
                buffer[target] = buffer[source]

    def read(self, row: int, length: int) -> State:
        """A copy of the state of a stream with `length` valid entries."""
        return {
            t.name: self._buffers[t.name][row, :, :length].copy()
            if t.kind == pb.STATE_KIND_STACK
            else self._buffers[t.name][row].copy()
            for t in self._tensors
        }

    def write(self, row: int, state: State) -> None:
        """Put a state that `read` gave into `row`."""
        for tensor in self._tensors:
            values = state[tensor.name]
            if tensor.kind == pb.STATE_KIND_STACK:
                self._buffers[tensor.name][row, :, : values.shape[1]] = values
            else:
                self._buffers[tensor.name][row] = values

    def _bind(self, first: int, batch: int) -> _Binding:
        views = {
            name: ort.OrtValue.ortvalue_from_numpy(buffer[first : first + batch])
            for name, buffer in self._buffers.items()
        }
        return _Binding(self._step_session, views)


class _Binding:
    """The step graph bound to the state of some rows; state goes in and out through one buffer."""

    def __init__(self, session: ort.InferenceSession, views: dict[str, ort.OrtValue]) -> None:
        self._session = session
        self._views = views  # keeps the memory that the binding points to alive
        self._io = session.io_binding()
        for name, view in views.items():
            self._io.bind_ortvalue_input(name, view)
            self._io.bind_ortvalue_output(f"next.{name}", view)

    def run(self, tokens: Ints, positions: Ints, lengths: Ints, rows: Ints) -> Floats:
        """`tokens[B, T]`, `positions[B, T]`, `lengths[B]` after the push, `rows[R]` to logits."""
        self._io.bind_cpu_input("tokens", tokens)
        self._io.bind_cpu_input("positions", positions)
        self._io.bind_cpu_input("lengths", lengths.astype(np.int32))
        self._io.bind_cpu_input("longest", np.array(lengths.max(), np.int32))
        self._io.bind_cpu_input("rows", rows)
        self._io.bind_output("logits")
        self._session.run_with_iobinding(self._io)
        logits: Floats = self._io.get_outputs()[-1].numpy()
        return logits


def _load(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # An idle engine must not burn the cores that its clients need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen unrelated classes here
        raise BundleError(f"{path} cannot be loaded: {error}") from None
