"""Does the exported pair of graphs compute what was trained? Streamed ONNX against PyTorch.

The reference is the float64 parallel forward. The stream here keeps its own books (lengths, folds,
slots) on purpose: it shares no code with the server.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import torch

from concertina.v1 import bundle_pb2 as pb
from model.decoder import Decoder

TOLERANCE = 1e-4
_JUNK = 1e4  # what dead entries are filled with, so that a stale read cannot hide

Array = npt.NDArray[np.float32]


class ParityError(Exception):
    """The exported graphs differ from the trained model by more than the tolerance."""


@dataclass
class _Stream:
    """Buffers of `batch` streams and where each of them stands."""

    state: dict[str, Array]
    positions: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


class _Graphs:
    """Both graphs of a bundle, run as a server would: stacks bound in place, folds on time."""

    def __init__(self, folder: Path, manifest: pb.Manifest) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        load = ort.InferenceSession
        self.tensors = list(manifest.state)
        self.span = manifest.fold.span if manifest.HasField("fold") else None
        self.context = manifest.context
        self.step_session = load(folder / "step.onnx", options)
        self.fold_session = load(folder / "fold.onnx", options) if self.span else None

    def start(self, batch: int) -> _Stream:
        state = {
            t.name: np.full(
                (batch, *t.shape),
                _JUNK if t.kind == pb.STATE_KIND_STACK else t.initial,
                np.float32,
            )
            for t in self.tensors
        }
        return _Stream(state, np.zeros(batch, np.int64), np.zeros(batch, np.int64))

    def step(self, stream: _Stream, tokens: npt.NDArray[np.int64]) -> Array:
        """Push `tokens[batch, time]`; logits `[batch, time, vocabulary]`."""
        batch, time = tokens.shape
        positions = stream.positions[:, None] + np.arange(time)
        stream.lengths += time
        binding = self.step_session.io_binding()
        binding.bind_cpu_input("tokens", tokens)
        binding.bind_cpu_input("positions", positions)
        binding.bind_cpu_input("lengths", stream.lengths.astype(np.int32))
        binding.bind_cpu_input("longest", np.array(stream.lengths.max(), np.int32))
        binding.bind_cpu_input("rows", np.arange(batch * time))
        binding.bind_output("logits")
        for tensor in self.tensors:
            values = stream.state[tensor.name]
            value = ort.OrtValue.ortvalue_from_numpy(values)
            binding.bind_ortvalue_input(tensor.name, value)
            binding.bind_ortvalue_output("next." + tensor.name, value)
        self.step_session.run_with_iobinding(binding)
        stream.positions += time
        logits: Array = binding.copy_outputs_to_cpu()[0]
        self._fold(stream)
        return logits.reshape(batch, time, -1)

    def _fold(self, stream: _Stream) -> None:
        if self.fold_session is None or self.span is None:
            return
        for row in np.flatnonzero(stream.positions % self.span == 0):
            base = int(stream.lengths[row]) - self.span
            feeds = {
                t.name: stream.state[t.name][row : row + 1, :, base : base + self.span]
                if t.kind == pb.STATE_KIND_STACK
                else stream.state[t.name][row : row + 1]
                for t in self.tensors
            }
            folded = self.fold_session.run(["next." + t.name for t in self.tensors], feeds)
            for tensor, values in zip(self.tensors, folded, strict=True):
                if tensor.kind == pb.STATE_KIND_STACK:
                    stream.state[tensor.name][row, :, base:] = _JUNK
                    stream.state[tensor.name][row, :, base] = values[0, :, 0]
                else:
                    stream.state[tensor.name][row] = values[0]
            stream.lengths[row] = base + 1


def check_parity(folder: Path, manifest: pb.Manifest, model: Decoder, seed: int = 0) -> pb.Parity:
    """Largest difference of any logit between the graphs in `folder` and `model`.

    Every prefix length up to 3 spans + 2, in several chunkings; then streams of different phases
    decoding in one batch. Raises ParityError beyond `TOLERANCE`.
    """
    graphs = _Graphs(folder, manifest)
    rng = np.random.default_rng(seed)
    span = manifest.fold.span if manifest.HasField("fold") else 16
    length = min(3 * span + 2, manifest.context)
    tokens = rng.integers(manifest.vocabulary, size=(4, length))
    tokens[:, 0] = manifest.vocabulary + rng.integers(1 + len(manifest.labels), size=4)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        expected = exact(torch.from_numpy(tokens)).numpy()  # [4, length, vocabulary]

    worst, positions = 0.0, 0
    for limit in (1, max(2, span // 3), span):
        stream = graphs.start(1)
        got = _prefill(graphs, stream, tokens[:1], limit, rng if limit < span else None)
        worst = _worse(worst, got, expected[:1])
        positions += length
    for end in range(1, length):
        got = _prefill(graphs, graphs.start(1), tokens[1:2, :end], span, None)
        worst = _worse(worst, got, expected[1:2, :end])
        positions += end
    worst = _mixed_phases(graphs, tokens, expected, span, worst)
    positions += 4 * length

    if not worst <= TOLERANCE:
        raise ParityError(
            f"the exported graphs differ from the trained model by {worst:.3g} in a logit; "
            f"the limit is {TOLERANCE:g}, so nothing was written"
        )
    return pb.Parity(max_error=worst, tolerance=TOLERANCE, positions=positions)


def _prefill(
    graphs: _Graphs,
    stream: _Stream,
    tokens: npt.NDArray[np.int64],
    limit: int,
    rng: np.random.Generator | None,
) -> Array:
    """Push `tokens[1, length]` in chunks of at most `limit` that end where blocks end."""
    done, parts = 0, []
    while done < tokens.shape[1]:
        room = limit if graphs.span is None else min(limit, graphs.span - done % graphs.span)
        chunk = int(rng.integers(1, room + 1)) if rng else room
        part = tokens[:, done : done + chunk]
        parts.append(graphs.step(stream, np.ascontiguousarray(part)))
        done += part.shape[1]
    return np.concatenate(parts, axis=1)


def _worse(worst: float, got: Array, expected: npt.NDArray[np.float64]) -> float:
    """The larger of `worst` and the largest difference; NaN, once seen, stays."""
    return float(np.maximum(worst, np.abs(got - expected).max()))


def _mixed_phases(
    graphs: _Graphs,
    tokens: npt.NDArray[np.int64],
    expected: npt.NDArray[np.float64],
    span: int,
    worst: float,
) -> float:
    """Four streams at different phases decode in one batch, which each leaves at its end."""
    length = tokens.shape[1]
    solos = []
    for row, begun in enumerate((1, span - 1, span, 2 * span + 1)):
        solo = graphs.start(1)
        got = _prefill(graphs, solo, tokens[row : row + 1, : min(begun, length - 1)], span, None)
        worst = _worse(worst, got, expected[row : row + 1, : got.shape[1]])
        solos.append(solo)
    batch = _Stream(
        {name: np.concatenate([s.state[name] for s in solos]) for name in solos[0].state},
        np.concatenate([s.positions for s in solos]),
        np.concatenate([s.lengths for s in solos]),
    )
    rows = np.arange(len(solos))
    while len(rows):
        at = batch.positions.copy()
        got = graphs.step(batch, tokens[rows, at][:, None])[:, 0]
        worst = _worse(worst, got, expected[rows, at])
        stay = batch.positions < length
        if not stay.all():
            rows = rows[stay]
            batch = _Stream(
                {name: values[stay] for name, values in batch.state.items()},
                batch.positions[stay],
                batch.lengths[stay],
            )
    return worst
