"""Do the exported graphs compute what was trained? Streamed ONNX against PyTorch.

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
    """Buffers of `batch` streams and where each of them stands: tokens, and entries of a stack."""

    state: dict[str, Array]
    positions: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]


class _Graphs:
    """The graphs of a bundle, run as a server would: state bound in place, folds on time."""

    def __init__(self, folder: Path, manifest: pb.Manifest) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        load = ort.InferenceSession
        self.tensors = list(manifest.state)
        self.span = manifest.fold.span if manifest.HasField("fold") else None
        self.binary = manifest.fold.binary
        self.step_session = load(folder / "step.onnx", options)
        self.fold_session = load(folder / "fold.onnx", options) if self.span else None

    def start(self, batch: int) -> _Stream:
        state = {
            t.name: np.full(
                (batch, *t.shape),
                t.initial if t.kind == pb.STATE_KIND_RECURRENT else _JUNK,
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
        feeds = {
            "tokens": tokens,
            "positions": positions,
            "lengths": stream.lengths.astype(np.int32),
            "longest": np.array(stream.lengths.max(), np.int32),
            "rows": np.arange(batch * time),
        }
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
        self._fold(stream)
        return logits.reshape(batch, time, -1)

    def _fold(self, stream: _Stream) -> None:
        if self.fold_session is None or self.span is None:
            return
        given = [value.name.removeprefix("next.") for value in self.fold_session.get_outputs()]
        for row in np.flatnonzero(stream.positions % self.span == 0):
            position, length = int(stream.positions[row]), int(stream.lengths[row])
            tokens = position & -position if self.binary else self.span
            entries = tokens.bit_length() if self.binary else self.span
            newest = {
                pb.STATE_KIND_STACK: (row, slice(None), slice(length - entries, length)),
                pb.STATE_KIND_HISTORY: (row, slice(position - tokens, position)),
                pb.STATE_KIND_RECURRENT: (row,),
            }
            parts = {t.name: (t.kind, stream.state[t.name][newest[t.kind]]) for t in self.tensors}
            feeds = {v.name: parts[v.name][1][None] for v in self.fold_session.get_inputs()}
            folded = self.fold_session.run(None, feeds)
            for name, values in zip(given, folded, strict=True):
                kind, part = parts[name]
                if kind == pb.STATE_KIND_STACK:
                    part[:] = _JUNK
                    part[:, 0] = values[0, :, 0]
                else:
                    part[:] = values[0]
            stream.lengths[row] = length - entries + 1


def check_parity(folder: Path, manifest: pb.Manifest, model: Decoder, seed: int = 0) -> pb.Parity:
    """Largest difference of any logit between the graphs in `folder` and `model`.

    Every prefix length up to 3 spans + 2, in several chunkings; then streams of different phases
    decoding in one batch. Raises ParityError beyond `TOLERANCE`.
    """
    graphs = _Graphs(folder, manifest)
    rng = np.random.default_rng(seed)
    span = model.config.span
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
