"""Runs the graphs of a bundle as a server does: state bound in place, folds when they are due.

All measurements of an export use this. It shares no code with the server on purpose, so that the
two check each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from concertina.bundle.resources import ELEMENT_TYPES
from concertina.v1 import bundle_pb2 as pb

_JUNK = 1e4  # value of invalid entries, so that a wrong read changes the result
_INTEGER_JUNK = 127  # the same where state is int8

Array = npt.NDArray[np.float32]


@dataclass
class Stream:
    """State buffers of several streams, and the tokens and valid stack entries of each."""

    state: dict[str, npt.NDArray[np.generic]]
    positions: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


class Graphs:
    """ONNX sessions of one bundle, and the passes that they run."""

    def __init__(self, folder: Path, manifest: pb.Manifest) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        load = ort.InferenceSession
        self.tensors = list(manifest.state)
        self.span = manifest.fold.span if manifest.HasField("fold") else None
        self.binary = manifest.fold.binary
        self.kept = manifest.fold.keep_first + manifest.fold.keep_newest
        self.taken = (1 + manifest.fold.keep_newest) * manifest.fold.span
        self.step_session = load(folder / "step.onnx", options)
        self.free = {
            value.name
            for value in self.step_session.get_inputs()
            if len(value.shape) == 4 and isinstance(value.shape[2], str)
        }
        """Stacks whose number of entries the graph does not fix."""
        self.fold_session = load(folder / "fold.onnx", options) if self.span else None

    def start(self, batch: int, most: int | None = None) -> Stream:
        """State of `batch` new streams of at most `most` tokens; None: of the whole context."""
        state = {
            t.name: np.full((batch, *self._shape(t, most)), _unset(t), ELEMENT_TYPES[t.data_type])
            for t in self.tensors
        }
        return Stream(state, np.zeros(batch, np.int64), np.zeros(batch, np.int64))

    def _shape(self, tensor: pb.StateTensor, most: int | None) -> list[int]:
        shape = list(tensor.shape)
        if most is not None and tensor.name in self.free and most < shape[1]:
            shape[1] = most
        return shape

    def step(self, stream: Stream, tokens: npt.NDArray[np.int64]) -> Array:
        """Push `tokens[batch, time]`, fold, and return logits `[batch, time, vocabulary]`."""
        logits = self.push(stream, tokens)
        self.fold(stream)
        return logits

    def push(self, stream: Stream, tokens: npt.NDArray[np.int64]) -> Array:
        """The same without the folds that are due then."""
        batch, time = tokens.shape
        positions = stream.positions[:, None] + np.arange(time)
        stream.lengths += time
        feeds = {
            "tokens": tokens,
            "positions": positions,
            "lengths": stream.lengths.astype(np.int32),
            "longest": np.array(stream.lengths.max(), np.int32),
            "rows": np.arange(batch * time),
        }
        for kept in {t.kept for t in self.tensors if t.HasField("kept")}:
            lengths = (self._lengths(stream, kept) + time).astype(np.int32)
            feeds[f"lengths.{kept}"] = lengths
            feeds[f"longest.{kept}"] = np.array(lengths.max(), np.int32)
        binding = self.step_session.io_binding()
        taken = {value.name for value in self.step_session.get_inputs()}
        given = {value.name for value in self.step_session.get_outputs()}
        for name in feeds.keys() & taken:
            binding.bind_cpu_input(name, feeds[name])
        binding.bind_output("logits")
        for tensor in self.tensors:
            value = ort.OrtValue.ortvalue_from_numpy(stream.state[tensor.name])
            if tensor.name in taken:
                binding.bind_ortvalue_input(tensor.name, value)
            if "next." + tensor.name in given:
                binding.bind_ortvalue_output("next." + tensor.name, value)
        self.step_session.run_with_iobinding(binding)
        stream.positions += time
        logits: Array = binding.copy_outputs_to_cpu()[0]
        return logits.reshape(batch, time, -1)

    def fold(self, stream: Stream) -> None:
        """Do the folds that are due."""
        if self.fold_session is None or self.span is None:
            return
        given = [value.name.removeprefix("next.") for value in self.fold_session.get_outputs()]
        due = stream.positions % self.span == 0
        for row in np.flatnonzero(due & (stream.positions > self.kept * self.span)):
            position = int(stream.positions[row])
            tokens = position & -position if self.binary else self.span
            entries = tokens.bit_length() if self.binary else self.taken
            parts = {}
            for t in self.tensors:
                end = int(self.unfolded(stream, t)[row])
                newest = {
                    pb.STATE_KIND_STACK: (row, slice(None), slice(max(0, end - entries), end)),
                    pb.STATE_KIND_HISTORY: (row, slice(position - tokens, position)),
                    pb.STATE_KIND_RECURRENT: (row,),
                }
                parts[t.name] = t.kind, stream.state[t.name][newest[t.kind]]
            feeds = {
                v.name: np.array([position]) if v.name == "tokens" else parts[v.name][1][None]
                for v in self.fold_session.get_inputs()
            }
            folded = self.fold_session.run(None, feeds)
            for name, values in zip(given, folded, strict=True):
                kind, part = parts[name]
                if kind == pb.STATE_KIND_STACK:
                    part[:] = _JUNK if part.dtype.kind == "f" else _INTEGER_JUNK
                    part[:, : values.shape[2]] = values[0]
                else:
                    part[:] = values[0]
            stream.lengths[row] -= entries - 1 if self.binary else self.span - 1

    def unfolded(self, stream: Stream, stack: pb.StateTensor) -> npt.NDArray[np.int64]:
        """Valid entries of a stack of each stream, before the folds that are due now."""
        if not stack.HasField("kept"):
            return stream.lengths
        return self._lengths(stream, stack.kept, folding=True)

    def _lengths(self, stream: Stream, kept: int, folding: bool = False) -> npt.NDArray[np.int64]:
        """Entries of stacks that keep so many of a block; `folding`: before the folds now due."""
        assert self.span is not None
        complete = (stream.positions - folding) // self.span
        folded = np.maximum(0, complete - self.kept)
        lengths: npt.NDArray[np.int64] = stream.positions - folded * (self.span - kept)
        return lengths


def _unset(tensor: pb.StateTensor) -> float:
    if tensor.kind == pb.STATE_KIND_RECURRENT:
        return tensor.initial
    return _INTEGER_JUNK if tensor.data_type == pb.DATA_TYPE_INT8 else _JUNK


def prefill(
    graphs: Graphs,
    stream: Stream,
    tokens: npt.NDArray[np.int64],
    limit: int,
    rng: np.random.Generator | None,
) -> Array:
    """Push `tokens[1, length]` and return all logits. No chunk is over `limit` or crosses a block.

    rng: chooses random chunk sizes; None uses the largest.
    """
    done, parts = 0, []
    while done < tokens.shape[1]:
        room = limit if graphs.span is None else min(limit, graphs.span - done % graphs.span)
        chunk = int(rng.integers(1, room + 1)) if rng else room
        part = tokens[:, done : done + chunk]
        parts.append(graphs.step(stream, np.ascontiguousarray(part)))
        done += part.shape[1]
    return np.concatenate(parts, axis=1)
