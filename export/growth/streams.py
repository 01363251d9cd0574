"""Bytes of one stream at chosen positions: what its live state takes, and what it should take."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from concertina.bundle.manifest import read_manifest, write_manifest
from concertina.bundle.resources import state_bytes
from concertina.v1 import bundle_pb2 as pb
from export.bundle import describe
from export.graphs import export_fold, export_step
from export.streaming import Graphs, Stream
from model.config import Attention, ModelConfig
from model.data import DatasetInfo
from model.decoder import Decoder
from model.run import Checkpoint, TrainConfig

FULL_LIMIT = 4**8
"""Full attention is streamed up to here; beyond, time would grow with the square."""

_CHUNK = 512
_NOISE = DatasetInfo("text", 7, "noise", "CC0-1.0")


@dataclass(frozen=True)
class Sample:
    """A stream after `pushed` tokens: bytes that it holds, if measured, and should hold."""

    attention: str
    context: int
    pushed: int
    allocated: int | None
    expected: int


def measure_streams(contexts: Sequence[int]) -> list[Sample]:
    """Streams of fixed with span = sqrt(context), of full and of hierarchical attention.

    The first two are weighed one token before each context ends, where a stream of fixed is
    heaviest; the last at many positions of one stream of the longest context.
    """
    samples: list[Sample] = []
    for context in contexts:
        samples += _stream("fixed", context, math.isqrt(context), [context - 1])
    ends = [context - 1 for context in contexts]
    samples += _stream("full", max(contexts), 2, ends, limit=FULL_LIMIT)
    samples += _stream("logsparse-hierarchical", max(contexts), 2, _positions(max(contexts)))
    return samples


def _positions(context: int) -> list[int]:
    """2^k - 1, where all bits are set, 2^k, where one is, the last one, and random ones between."""
    rng = np.random.default_rng(0)
    octaves = [1 << bit for bit in range(2, context.bit_length())]
    drawn = [int(p) for low in octaves[:-1] for p in rng.integers(low, 2 * low, size=12)]
    return sorted({*drawn, *octaves, *(octave - 1 for octave in octaves), context - 1})


def _stream(
    attention: Attention, context: int, span: int, positions: Iterable[int], limit: int = 1 << 62
) -> Iterator[Sample]:
    """Push one stream through its graphs and weigh its state at `positions` up to `limit`."""
    config = ModelConfig(
        _NOISE.vocabulary,
        context=min(context, limit),
        width=16,
        layers=1,
        heads=2,
        mlp=8,
        span=span,
        attention=attention,
        positions="sinusoid",
    )
    with tempfile.TemporaryDirectory() as name:
        folder = _export(config, Path(name))
        manifest = read_manifest(folder)
        graphs = Graphs(folder, manifest)
    stream = graphs.start(batch=1)
    tokens = np.random.default_rng(0).integers(config.vocabulary, size=(1, _CHUNK))
    for position in positions:
        allocated = None
        if position <= limit:
            while missing := position - (pushed := int(stream.positions[0])):
                room = graphs.span - pushed % graphs.span if graphs.span else _CHUNK
                graphs.step(stream, tokens[:, : min(missing, room)])
            allocated = sum(part.nbytes for part in _live(graphs, stream))
        yield Sample(attention, context, position, allocated, state_bytes(manifest, position))
    print(f"{attention}, context {context}: streamed", file=sys.stderr)


def _live(graphs: Graphs, stream: Stream) -> Iterator[npt.NDArray[np.generic]]:
    """A copy of what has to be kept of the stream to continue it elsewhere."""
    entries, rows = int(stream.lengths[0]), int(stream.positions[0])
    for tensor in graphs.tensors:
        live = stream.state[tensor.name][0]
        if tensor.kind == pb.STATE_KIND_STACK:
            live = live[:, :entries]
        elif tensor.kind == pb.STATE_KIND_HISTORY:
            live = live[:rows]
        yield live.copy()


def _export(config: ModelConfig, folder: Path) -> Path:
    """A bundle without a parity check, whose cost grows with the square of the span."""
    model = Decoder(config).eval()
    checkpoint = Checkpoint(config, TrainConfig(), _NOISE, 0, {"tokens": 0.0}, model)
    manifest, files = describe(checkpoint, config.attention, "1"), ["step.onnx"]
    export_step(model, folder / "step.onnx")
    if manifest.HasField("fold"):
        export_fold(model, folder / "fold.onnx")
        files.append("fold.onnx")
    write_manifest(folder, manifest, files)
    return folder
