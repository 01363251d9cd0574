"""The only door to onnxruntime: sessions, state buffers, and the two passes over them.

Buffers hold one row per slot, bound once and changed in place: nothing here costs O(context).
Shapes: `B` streams, `T` tokens, `H` heads, `E` entries, `D` head_dim, `s` span.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
"""The state of one stream, stacks and histories cut to what is valid."""

_NEXT = "next."
_LOGITS = "logits"

# Between the nodes of a step a thread that sleeps costs more to wake than the node takes; an engine
# that waits, though, must not burn the cores that its clients need.
_THREADING = {
    "session.intra_op.allow_spinning": "1",
    "session.intra_op.spin_duration_us": "50",
    "session.force_spinning_stop": "1",
}

_DTYPES: dict[int, type[np.generic]] = {
    pb.DATA_TYPE_FLOAT32: np.float32,
    pb.DATA_TYPE_FLOAT16: np.float16,
}


@dataclass(frozen=True)
class Extent:
    """How far the state of a stream reaches."""

    entries: int
    """Valid entries of every stack."""
    tokens: int
    """Rows of every history."""


_NOTHING = Extent(0, 0)


class Runtime:
    """Runs the graphs of one bundle over `rows` streams' state. Rows are plain indices."""

    def __init__(self, bundle: Bundle, rows: int, threads: int = 0) -> None:
        self._tensors = {tensor.name: tensor for tensor in bundle.manifest.state}
        self._step_session = _load(bundle.step_path, threads)
        self._fold_session = _load(bundle.fold_path, 1) if bundle.span else None
        self._buffers = {
            t.name: np.full((rows, *t.shape), t.initial, _DTYPES[t.data_type])
            for t in self._tensors.values()
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

    def fold(self, rows: Sequence[int], begins: Sequence[Extent], ends: Sequence[Extent]) -> None:
        """Fold what each of `rows` holds between two extents; all take parts of the same size."""
        assert self._fold_session is not None
        parts = {
            name: [self._part(tensor, *place) for place in zip(rows, begins, ends, strict=True)]
            for name, tensor in self._tensors.items()
        }
        feeds = {v.name: np.stack(parts[v.name]) for v in self._fold_session.get_inputs()}
        folded = self._fold_session.run(None, feeds)
        names = [v.name.removeprefix(_NEXT) for v in self._fold_session.get_outputs()]
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
                self._buffers[tensor.name][row] = tensor.initial

    def move(self, source: int, target: int, extent: Extent) -> None:
        """Copy a stream's state, which reaches as far as `extent`, to another row."""
        for tensor in self._tensors.values():
            part = self._part(tensor, target, _NOTHING, extent)
            part[...] = self._part(tensor, source, _NOTHING, extent)

    def read(self, row: int, end: Extent, begin: Extent = _NOTHING) -> State:
        """A copy of a stream's state, which reaches as far as `end`, from `begin` on."""
        return {t.name: self._part(t, row, begin, end).copy() for t in self._tensors.values()}

    def write(self, row: int, end: Extent, state: State) -> None:
        """Put those tensors of a state that reaches as far as `end` into `row`."""
        for name, values in state.items():
            self._part(self._tensors[name], row, _NOTHING, end)[...] = values

    def _part(
        self, tensor: pb.StateTensor, row: int, begin: Extent, end: Extent
    ) -> npt.NDArray[np.generic]:
        """A view of what a row holds between two extents; of a recurrent tensor, all."""
        buffer: npt.NDArray[np.generic] = self._buffers[tensor.name][row]
        if tensor.kind == pb.STATE_KIND_STACK:
            return buffer[:, begin.entries : end.entries]
        if tensor.kind == pb.STATE_KIND_HISTORY:
            return buffer[begin.tokens : end.tokens]
        return buffer

    def _bind(self, first: int, batch: int) -> _Binding:
        views = {
            name: ort.OrtValue.ortvalue_from_numpy(buffer[first : first + batch])
            for name, buffer in self._buffers.items()
        }
        return _Binding(self._step_session, views)


class _Binding:
    """The step graph bound to the state of some rows; state goes in and out through one buffer.

    Inputs and logits lie in buffers that stay bound until their shape changes: a step of the same
    batch binds nothing.
    """

    def __init__(self, session: ort.InferenceSession, views: dict[str, ort.OrtValue]) -> None:
        self._session = session
        self._views = views  # keeps the memory that the binding points to alive
        self._io = session.io_binding()
        self._taken = {value.name for value in session.get_inputs()}
        given = {value.name: value for value in session.get_outputs()}
        self._vocabulary: int = given[_LOGITS].shape[1]
        self._logits: Floats | None = None
        self._bound: dict[str, npt.NDArray[np.generic]] = {}
        for name, view in views.items():
            if name in self._taken:
                self._io.bind_ortvalue_input(name, view)
            if _NEXT + name in given:
                self._io.bind_ortvalue_output(_NEXT + name, view)

    def run(self, tokens: Ints, positions: Ints, lengths: Ints, rows: Ints) -> Floats:
        """`tokens[B, T]`, `positions[B, T]`, `lengths[B]` after the push, `rows[R]` to logits."""
        feeds = {"tokens": tokens, "positions": positions, "rows": rows}
        if "longest" in self._taken:
            feeds["longest"] = np.array(lengths.max(), np.int32)
        if "lengths" in self._taken:
            feeds["lengths"] = lengths.astype(np.int32)
        for name, values in feeds.items():
            bound = self._bound.get(name)
            if bound is None or bound.shape != values.shape:
                bound = self._bound[name] = np.empty_like(values, order="C")
                self._io.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(bound))
            bound[...] = values
        if self._logits is None or len(self._logits) != len(rows):
            self._logits = np.empty((len(rows), self._vocabulary), np.float32)
            self._io.bind_ortvalue_output(_LOGITS, ort.OrtValue.ortvalue_from_numpy(self._logits))
        self._session.run_with_iobinding(self._io)
        return self._logits


def _load(path: Path, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for entry, value in _THREADING.items():
        options.add_session_config_entry(entry, value)
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a dozen unrelated classes here
        raise BundleError(f"{path} cannot be loaded: {error}") from None
