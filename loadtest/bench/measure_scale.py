"""Two promises about scale, by what the process really holds and how long steps really take.

One stream of a million tokens: after its first tokens the process grows by no more than the
stream's state, and its last tokens take hardly longer than its first.
Many streams: hundreds decode at once, each of them deep in a long context, within a limit of
resident memory. Their positions are real, the content of their state is made up.

Both run the real engine on random weights.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import psutil
import typer

from concertina.bundle.manifest import read_manifest
from concertina.bundle.resources import state_bytes
from loadtest.bench.adapters.adapter import Setting
from loadtest.bench.adapters.ours import generate, open_engine, open_session, prepare, random_prompt
from loadtest.bench.plan import ROOM, Shape

MAX_SLOWDOWN = 1.5
"""Of a token at the end over one at the beginning."""
NOISE_BYTES = 2 << 20
"""What the allocator and the interpreter may take besides, whatever the stream's length."""
MAX_RESIDENT = 8 << 30

_SMALL = Shape(layers=2, width=128, heads=2, mlp=512)
_BENCH = Shape()


@dataclass(frozen=True)
class LongStream:
    """One stream, sampled every `window` tokens."""

    window: int
    resident: tuple[int, ...]
    """Bytes of the process after each window."""
    seconds: tuple[float, ...]
    """How long each window took."""
    cpu_seconds: tuple[float, ...]
    """Of processor time: what others do on the machine does not count."""
    predicted: int
    """Bytes by which the stream's state grew from the end of the first window to its own end."""

    @property
    def growth(self) -> int:
        """Bytes by which the process grew after the first window."""
        return max(self.resident) - self.resident[0]

    @property
    def slowdown(self) -> float:
        """Median processor time of the last windows over that of the first, a twentieth each.

        The first window, in which everything is touched for the first time, is left out.
        """
        few = max(1, len(self.cpu_seconds) // 20)
        return float(np.median(self.cpu_seconds[-few:]) / np.median(self.cpu_seconds[1 : 1 + few]))

    def complaints(self) -> list[str]:
        """What is not as promised."""
        found = []
        if self.growth > self.predicted + NOISE_BYTES:
            found.append(
                f"the process grew by {self.growth} bytes after the first {self.window} tokens; "
                f"state_bytes says {self.predicted}, and {NOISE_BYTES} are allowed for noise"
            )
        if self.slowdown > MAX_SLOWDOWN:
            found.append(
                f"a token took {self.slowdown:.2f} times as long at the end as at the beginning; "
                f"the limit is {MAX_SLOWDOWN}"
            )
        return found


@dataclass(frozen=True)
class ManyStreams:
    """Many streams at once."""

    streams: int
    context: int
    steps: int
    state_bytes: int
    """Of one stream."""
    peak_resident: int
    """Bytes of the process at its largest."""
    tokens_per_second: float
    """Of all streams together."""

    def complaints(self, limit: int = MAX_RESIDENT) -> list[str]:
        """What is not as promised."""
        if self.peak_resident <= limit:
            return []
        return [
            f"{self.streams} streams at {self.context} tokens took {self.peak_resident} bytes "
            f"of resident memory; the limit is {limit}"
        ]


def measure_stream(tokens: int, window: int, span: int, shape: Shape = _SMALL) -> LongStream:
    """Decode one stream of `tokens` tokens, a multiple of `window`."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "bundle"
        _prepare(Setting(shape, folder, tokens, 1, span, 1, room=span))
        return asyncio.run(_watch(folder, tokens, window))


async def _watch(folder: Path, tokens: int, window: int) -> LongStream:
    process, seen = psutil.Process(), 0
    resident: list[int] = []
    seconds: list[float] = []
    cpu_seconds: list[float] = []
    with open_engine(folder, slots=1, threads=1) as engine:
        began, cpu_began = time.perf_counter(), time.process_time()
        async for ids in generate(engine, random_prompt(engine, 0), tokens=tokens):
            seen += len(ids)
            while seen >= window * (len(resident) + 1):
                now, cpu_now = time.perf_counter(), time.process_time()
                resident.append(process.memory_info().rss)
                seconds.append(now - began)
                cpu_seconds.append(cpu_now - cpu_began)
                began, cpu_began = now, cpu_now
                print(f"{seen:,} tokens", file=sys.stderr)
    assert seen == tokens, f"{seen} tokens came, {tokens} were asked for"
    manifest = read_manifest(folder)
    grown = max(0, state_bytes(manifest, tokens) - state_bytes(manifest, window))
    return LongStream(window, tuple(resident), tuple(seconds), tuple(cpu_seconds), grown)


def measure_many(
    streams: int,
    context: int,
    span: int,
    steps: int,
    threads: int,
    state: str = "float32",
    shape: Shape = _BENCH,
) -> ManyStreams:
    """Decode `steps` tokens of each of `streams` streams that end within `context` tokens."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "bundle"
        setting = Setting(shape, folder, context - ROOM, streams, span, threads, ROOM, state=state)
        _prepare(setting)
        session = open_session(setting)
    try:
        window = session.decode(steps)
    finally:
        session.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rate = window.tokens / window.seconds
    return ManyStreams(streams, context, steps, session.cache_bytes, peak, rate)


def _prepare(setting: Setting) -> None:
    """Make the bundle in another process: what torch takes is not the engine's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(prepare, setting).result(timeout=300)


app = typer.Typer(add_completion=False)
_State = Literal["float32", "float16", "int8"]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the figures as JSON.")
]


@app.command()
def stream(
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the stream.")] = 1_000_000,
    window: Annotated[int, typer.Option(min=1, help="Tokens between two samples.")] = 10_000,
    span: Annotated[int, typer.Option(min=2, help="Tokens of a block.")] = 1024,
    json_file: JsonFile = None,
) -> None:
    """Decode one long stream. Exit code 1 when it takes more memory or time than promised.

    Examples:
    python -m loadtest.bench.measure_scale stream
    python -m loadtest.bench.measure_scale stream --tokens 40000 --window 2000 --span 64
    """
    found = measure_stream(tokens, window, span)
    print(
        f"{tokens:,} tokens: after the first {found.window:,} the process grew by "
        f"{found.growth:,} bytes, its state by {found.predicted:,}; a token took "
        f"{np.median(found.cpu_seconds) / found.window * 1e3:.2f} ms of processor time, and "
        f"{found.slowdown:.2f} times as long at the end as at the beginning"
    )
    _conclude(found, json_file)


@app.command()
def many(
    streams: Annotated[int, typer.Option(min=1, help="Streams that decode at once.")] = 400,
    context: Annotated[int, typer.Option(min=ROOM + 1, help="Tokens of each.")] = 65_536,
    span: Annotated[int, typer.Option(min=2, help="Tokens of a block.")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="Tokens that each decodes.")] = 64,
    threads: Annotated[int, typer.Option(min=1, help="Threads of a step.")] = 2,
    state: Annotated[_State, typer.Option(help="Precision of the state.")] = "float32",
    json_file: JsonFile = None,
) -> None:
    """Decode many streams deep in their context. Exit code 1 when they take too much memory.

    Examples:
    python -m loadtest.bench.measure_scale many
    python -m loadtest.bench.measure_scale many --streams 1400 --state int8
    python -m loadtest.bench.measure_scale many --streams 8 --context 4096 --span 64
    """
    found = measure_many(streams, context, span, steps, threads, state)
    print(
        f"{found.streams} streams at {found.context:,} tokens, {found.state_bytes:,} bytes of "
        f"state each: {found.peak_resident / 2**30:.2f} GiB resident at most, "
        f"{found.tokens_per_second:.1f} tokens/s"
    )
    _conclude(found, json_file)


def _conclude(found: LongStream | ManyStreams, json_file: Path | None) -> None:
    if json_file is not None:
        json_file.write_text(json.dumps(asdict(found), indent=1) + "\n")
    if complaints := found.complaints():
        print(*complaints, sep="\n", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
