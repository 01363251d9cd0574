"""How near a step comes to what the machine can do.

Three figures of the bench's model (25M random weights, `fixed`, 256 tokens of context):

- overhead: the share of a step of 32 streams that the engine spends outside `session.run`;
- bandwidth: the time of a step of one stream, over the time of reading as many bytes as its weights
  and its live state from memory;
- sgemm: the rate of a step of 32 streams, over the rate of large matrix products.

Engine and machine are measured in turns, in short windows, with the same threads. A figure is the
median over the rounds, each with the rates of its own round; beside it is the figure of the fastest
windows, which other work on the machine disturbs least. docs/performance.md shows them.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime as ort
import torch
import typer

from concertina.bundle.manifest import read_manifest
from concertina.bundle.resources import entries, state_bytes
from loadtest.bench.adapters import ours
from loadtest.bench.adapters.adapter import Session, Setting
from loadtest.bench.plan import ROOM, Shape

_CONTEXT, _SPAN, _STREAMS = 256, 16, 32
_TARGETS = {"overhead": "<= 0.05", "bandwidth": "<= 1.5", "sgemm": ">= 0.6"}
_READ_BYTES = 512 << 20  # more than any cache
_SIDE = 2048  # of the matrices whose product is timed


@dataclass(frozen=True)
class Round:
    """What one round measures: seconds of a step, bytes/s, operations/s."""

    one_s: float
    many_s: float
    outside_s: float
    """Of a step of many: the time outside `session.run`."""
    bytes_per_s: float
    flops: float


def measure_step(
    threads: Annotated[
        int, typer.Option(min=1, help="Threads of a step, and of what it is compared with.")
    ] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; a round takes a few seconds.")] = 15,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every round as JSON.")
    ] = None,
) -> None:
    """Print overhead, bandwidth and sgemm of a step, and what they are made of.

    Examples:
    python -m loadtest.bench.measure_step --json step.json
    python -m loadtest.bench.measure_step --threads 1 --rounds 3
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    shape = Shape()
    with tempfile.TemporaryDirectory() as root, _run_clock() as clock:
        setting = Setting(shape, Path(root) / "b", _CONTEXT, 1, _SPAN, threads, ROOM)
        ours.prepare(setting)
        manifest = read_manifest(setting.folder)
        one = ours.open_session(setting)
        many = ours.open_session(replace(setting, streams=_STREAMS))
        read, multiply = _reader(threads), _multiplier()
        rows = [_round(one, many, clock, read, multiply) for _ in range(rounds + 1)][1:]
        one.close()
        many.close()
    read_bytes = 4 * manifest.parameters + state_bytes(manifest, _CONTEXT)
    flops = _STREAMS * _step_flops(shape, entries(manifest, _CONTEXT) + _SPAN // 2)
    best = Round(
        min(r.one_s for r in rows),
        min(r.many_s for r in rows),
        min(r.outside_s for r in rows),
        max(r.bytes_per_s for r in rows),
        max(r.flops for r in rows),
    )
    figures = {name: [_figures(r, read_bytes, flops)[name] for r in rows] for name in _TARGETS}
    fastest = _figures(best, read_bytes, flops)
    print("| figure | median | fastest windows | target |\n|---|---|---|---|")
    for name, values in figures.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.3f} | {fastest[name]:.3f} | {_TARGETS[name]} |")
    print(
        f"\nfastest: {best.one_s * 1e3:.2f} ms for 1 stream, {best.many_s * 1e3:.2f} ms for "
        f"{_STREAMS}, {best.outside_s * 1e3:.2f} ms of them outside, "
        f"{best.bytes_per_s / 1e9:.1f} GB/s, {best.flops / 1e9:.0f} GFLOP/s"
    )
    if json_file is not None:
        report = {
            "figures": figures,
            "fastest": fastest,
            "rounds": [asdict(r) for r in rows],
            "step_bytes": read_bytes,
            "step_flops": flops,
            "threads": threads,
        }
        json_file.write_text(json.dumps(report, indent=1))


def _figures(seen: Round, read_bytes: int, flops: int) -> dict[str, float]:
    return {
        "overhead": seen.outside_s / seen.many_s,
        "bandwidth": seen.one_s * seen.bytes_per_s / read_bytes,
        "sgemm": flops / seen.many_s / seen.flops,
    }


def _round(
    one: Session,
    many: Session,
    clock: list[float],
    read: Callable[[], float],
    multiply: Callable[[], float],
) -> Round:
    one_s = _step_s(one, 1)
    rate = read()
    flops = multiply()
    clock[0] = 0.0
    began = time.perf_counter()
    window = many.decode(2 * _SPAN)
    outside = 1 - clock[0] / (time.perf_counter() - began)
    many_s = window.seconds * _STREAMS / window.tokens
    return Round(one_s, many_s, outside * many_s, rate, flops)


def _step_s(session: Session, streams: int) -> float:
    window = session.decode(2 * _SPAN)
    return window.seconds * streams / window.tokens


def _step_flops(shape: Shape, entries: int) -> int:
    """Operations of one token's matrix products; a multiply-add is two."""
    layer = 4 * shape.width**2 + 2 * shape.width * shape.mlp + 2 * entries * shape.width
    return 2 * (shape.layers * layer + shape.width * shape.vocabulary)


def _reader(threads: int) -> Callable[[], float]:
    """Bytes/s of reading an array that no cache holds, all threads at once."""
    parts = np.array_split(np.ones(_READ_BYTES // 4, np.float32), threads)
    pool = ThreadPoolExecutor(threads)

    def read() -> float:
        began = time.perf_counter()
        list(pool.map(np.max, parts))
        return _READ_BYTES / (time.perf_counter() - began)

    return read


def _multiplier() -> Callable[[], float]:
    """Operations/s of a product of two large matrices in float32."""
    left, right = torch.rand(_SIDE, _SIDE), torch.rand(_SIDE, _SIDE)

    def multiply() -> float:
        began = time.perf_counter()
        left @ right
        return 2 * _SIDE**3 / (time.perf_counter() - began)

    return multiply


@contextmanager
def _run_clock() -> Iterator[list[float]]:
    """Sum the seconds that sessions run, on any thread, in the list's one element."""
    clock = [0.0]
    names = ("run", "run_with_iobinding")
    kept = {name: getattr(ort.InferenceSession, name) for name in names}

    def timed(run: Callable[..., object]) -> Callable[..., object]:
        def timed_run(*args: object, **options: object) -> object:
            began = time.perf_counter()
            try:
                return run(*args, **options)
            finally:
                clock[0] += time.perf_counter() - began

        return timed_run

    for name, run in kept.items():
        setattr(ort.InferenceSession, name, timed(run))
    try:
        yield clock
    finally:
        for name, run in kept.items():
            setattr(ort.InferenceSession, name, run)


if __name__ == "__main__":
    typer.run(measure_step)
