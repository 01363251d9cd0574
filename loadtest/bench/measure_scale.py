"""Two promises about scale, from what the process really holds and how long steps really take.

    python tools/measure_scale.py stream
    python tools/measure_scale.py crowd

`stream`: one stream of a million tokens. After its first tokens the process grows by no more than
the stream's state, and its last tokens take hardly longer than its first.
`crowd`: hundreds of streams decode at once, each of them deep in a long context, within a limit of
resident memory. Where they stand is real, the content of their state is made up.

Both run the real engine on random weights. Exit code 1 when a promise is broken.
"""

from __future__ import annotations

import argparse
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

import numpy as np
import psutil

from loadtest.bench.adapters.adapter import Setting
from loadtest.bench.adapters.ours import open_session, prepare
from loadtest.bench.plan import ROOM, Shape
from server.bundles.bundle import Bundle, load_bundle
from server.config import EngineConfig
from server.engine.engine import Engine
from server.engine.events import Delta, Request
from server.engine.sampling.sampler import SamplingParameters

MAX_SLOWDOWN = 1.5
"""Of a token at the end over one at the beginning."""
NOISE_BYTES = 2 << 20
"""What the allocator and the interpreter may hold more, whatever the stream's length."""
MAX_RESIDENT = 8 << 30

_SMALL = Shape(layers=2, width=128, heads=2, mlp=512)
_BENCH = Shape()


@dataclass(frozen=True)
class LongStream:
    """One stream, looked at every `window` tokens."""

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

        The very first window, in which everything is touched for the first time, is left out.
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
class Crowd:
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
        setting = Setting(shape, "", Path(directory) / "bundle", tokens, 1, span, 1, room=span)
        _prepare(setting)
        bundle = load_bundle(setting.folder)
        engine = Engine(bundle, EngineConfig(slots=1, threads=setting.threads))
    try:
        return asyncio.run(_watch(engine, bundle, tokens, window))
    finally:
        engine.close()


async def _watch(engine: Engine, bundle: Bundle, tokens: int, window: int) -> LongStream:
    process, seen = psutil.Process(), 0
    resident: list[int] = []
    seconds: list[float] = []
    cpu_seconds: list[float] = []
    request = Request(
        np.array([bundle.manifest.vocabulary]), SamplingParameters(seed=0), max_tokens=tokens
    )
    began, cpu_began = time.perf_counter(), time.process_time()
    async for event in engine.events(engine.submit(request)):
        if isinstance(event, Exception):
            raise event
        seen += len(event.tokens) if isinstance(event, Delta) else 0
        while seen >= window * (len(resident) + 1):
            now, cpu_now = time.perf_counter(), time.process_time()
            resident.append(process.memory_info().rss)
            seconds.append(now - began)
            cpu_seconds.append(cpu_now - cpu_began)
            began, cpu_began = now, cpu_now
            print(f"{seen:,} tokens", file=sys.stderr)
    assert seen == tokens, f"{seen} tokens came, {tokens} were asked for"
    sizes = (sum(bundle.state_bytes(pushed).values()) for pushed in (window, tokens))
    first, last = sizes
    grown = max(0, last - first)
    return LongStream(window, tuple(resident), tuple(seconds), tuple(cpu_seconds), grown)


def measure_crowd(
    streams: int, context: int, span: int, steps: int, threads: int, shape: Shape = _BENCH
) -> Crowd:
    """Decode `steps` tokens of each of `streams` streams that end within `context` tokens."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "bundle"
        setting = Setting(shape, "", folder, context - ROOM, streams, span, threads, ROOM)
        _prepare(setting)
        session = open_session(setting)
    try:
        window = session.decode(steps)
    finally:
        session.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rate = window.tokens / window.seconds
    return Crowd(streams, context, steps, session.cache_bytes, peak, rate)


def _prepare(setting: Setting) -> None:
    """In a process of its own: what torch takes is not the engine's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(prepare, setting).result(timeout=300)


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="file that the figures go to")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("stream", help="one long stream").add_argument
    add("--tokens", type=int, default=1_000_000)
    add("--window", type=int, default=10_000, help="tokens between two looks")
    add("--span", type=int, default=1024)
    add = commands.add_parser("crowd", help="many streams at once").add_argument
    add("--streams", type=int, default=400)
    add("--context", type=int, default=65_536)
    add("--span", type=int, default=256)
    add("--steps", type=int, default=64)
    add("--threads", type=int, default=2)
    options = parser.parse_args()
    found: LongStream | Crowd
    if options.command == "stream":
        found = measure_stream(options.tokens, options.window, options.span)
        print(
            f"{options.tokens:,} tokens: after the first {found.window:,} the process grew by "
            f"{found.growth:,} bytes, its state by {found.predicted:,}; a token took "
            f"{np.median(found.cpu_seconds) / found.window * 1e3:.2f} ms of processor time, and "
            f"{found.slowdown:.2f} times as long at the end as at the beginning"
        )
    else:
        found = measure_crowd(
            options.streams, options.context, options.span, options.steps, options.threads
        )
        print(
            f"{found.streams} streams at {found.context:,} tokens, {found.state_bytes:,} bytes of "
            f"state each: {found.peak_resident / 2**30:.2f} GiB resident at most, "
            f"{found.tokens_per_second:.1f} tokens/s"
        )
    if options.json:
        options.json.write_text(json.dumps(asdict(found), indent=1) + "\n")
    wrong = found.complaints()
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
