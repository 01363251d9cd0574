"""Bytes of one stream at chosen positions: what the server's cache parks, and what it should."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from concertina.bundle.manifest import write_manifest
from concertina.bundle.resources import state_bytes
from export.bundle import describe
from export.graphs import export_fold, export_step
from model.config import Attention, ModelConfig
from model.data import DatasetInfo
from model.decoder import Decoder
from model.train import Checkpoint, TrainConfig
from server.bundles.bundle import load_bundle
from server.engine.kv_cache import Cache
from server.runtime.onnx_session import Runtime

FULL_LIMIT = 4**8
"""Full attention is streamed up to here; beyond, time would grow with the square."""

_CHUNK = 512
_NOISE = DatasetInfo("text", 7, "noise", "CC0-1.0")


@dataclass(frozen=True)
class Sample:
    """A stream after `pushed` tokens: bytes that it holds, if measured, and ought to hold."""

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
    """Push one stream through a cache and weigh what `park` gives at `positions` up to `limit`."""
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
    with tempfile.TemporaryDirectory() as folder:
        bundle = load_bundle(_export(config, Path(folder)))
        cache = Cache(bundle, Runtime(bundle, rows=2, threads=1), slots=1)
    tokens = np.random.default_rng(0).integers(config.vocabulary, size=_CHUNK)
    cache.seat()
    for position in positions:
        expected, allocated = state_bytes(bundle.manifest, position), None
        if position <= limit:
            while room := min(position - cache.bench_pushed, cache.block_room, _CHUNK):
                cache.prefill(tokens[:room])
            row = cache.join()
            state = cache.park(row).state
            assert all(values.flags.owndata for values in state.values())
            allocated = sum(values.nbytes for values in state.values())
            cache.leave(row)
        yield Sample(attention, context, position, allocated, expected)
    print(f"{attention}, context {context}: streamed", file=sys.stderr)


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
