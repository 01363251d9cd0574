"""The figures of docs/performance.md: engine alone, then the same streams seen by gRPC clients.

    python tools/measure.py bundles/python-4k
    python tools/measure.py                     # the bench's model, 25M random weights
    python tools/measure.py --threads 1         # leave cores to the clients, which run here as well

Engine and servers are measured in turns, so that a noisy machine is noisy for all of them; what is
printed are medians over the rounds.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer

from loadtest.bench.bundles import make_bundle
from loadtest.bench.plan import Shape
from server.api.health import is_serving
from server.bundles.bundle import load_bundle
from server.config import EngineConfig
from server.engine.engine import Engine
from server.engine.events import Finish, Request
from server.engine.sampling.sampler import SamplingParameters
from server.ops.ports import free_ports

_STREAMS = (1, 8, 32)
_START_LIMIT_S = 120.0


def main(
    bundle: Annotated[Path | None, typer.Argument(help="Bundle to measure.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each stream.")] = 512,
    prompt: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds; medians are printed.")] = 3,
    threads: Annotated[int, typer.Option(help="Of the engine, everywhere; 0 for all cores.")] = 0,
) -> None:
    """Print tokens/s of the engine alone and through gRPC, and the time from serve to ready."""
    with tempfile.TemporaryDirectory() as root:
        if bundle is None:
            bundle = Path(root) / "bench"
            make_bundle(bundle, Shape(), 1024, 32)
        _measure(bundle, tokens, prompt, rounds, threads)


def _measure(bundle: Path, tokens: int, prompt: int, rounds: int, threads: int) -> None:
    figures: dict[str, list[float]] = {}
    given = ("--threads", str(threads))
    homes = {"ray": given, "local": ("--local", *given)}
    for _ in range(rounds):
        for streams in _STREAMS:
            rate = asyncio.run(_engine(bundle, streams, prompt, tokens, threads))
            figures.setdefault(f"engine, {streams} streams, tokens/s", []).append(rate)
        for home, options in homes.items():
            with _served(bundle, options) as (address, ready_s):
                rate = _clients(address, max(_STREAMS), prompt, tokens)
            figures.setdefault(f"{home}, ready after, s", []).append(ready_s)
            figures.setdefault(f"{home}, 32 clients, tokens/s", []).append(rate)
    medians = {name: round(statistics.median(values), 2) for name, values in figures.items()}
    for home in homes:
        share = medians[f"{home}, 32 clients, tokens/s"] / medians["engine, 32 streams, tokens/s"]
        medians[f"{home}, share of the engine"] = round(share, 3)
    print(json.dumps({"rounds": figures, "medians": medians}, indent=1))


async def _engine(folder: Path, streams: int, prompt: int, tokens: int, threads: int) -> float:
    """Tokens/s of `streams` streams at once, prompts included, without any server."""
    bundle = load_bundle(folder)
    engine = Engine(bundle, EngineConfig(slots=streams, threads=threads))

    async def one(seed: int, count: int) -> int:
        ids = np.random.default_rng(seed).integers(bundle.manifest.vocabulary, size=prompt)
        start = [bundle.manifest.vocabulary]
        request = Request(
            prompt=np.concatenate((start, ids)),
            sampling=SamplingParameters(seed=seed),
            max_tokens=count,
        )
        async for event in engine.events(engine.submit(request)):
            if isinstance(event, Finish):
                return event.generated
        raise AssertionError("a stream ended without its ending")

    try:
        await asyncio.gather(*(one(seed, 64) for seed in range(streams)))
        began = time.perf_counter()
        done = await asyncio.gather(*(one(seed, tokens) for seed in range(streams)))
        return sum(done) / (time.perf_counter() - began)
    finally:
        engine.close()


@contextmanager
def _served(bundle: Path, options: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    """A `concertina serve` of its own; its address, and the seconds until it answered."""
    port, metrics_port = free_ports(2)
    address = f"127.0.0.1:{port}"
    command = [sys.executable, "-m", "concertina.cli.main", "serve", str(bundle), *options]
    command += ["--port", str(port), "--metrics-port", str(metrics_port), "--drain-seconds", "2"]
    began = time.perf_counter()
    server = psutil.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not is_serving(address):
            if server.poll() is not None or time.perf_counter() - began > _START_LIMIT_S:
                raise RuntimeError("the server did not start")
            time.sleep(0.05)
        yield address, time.perf_counter() - began
    finally:
        server.terminate()
        server.wait(60)


def _clients(address: str, streams: int, prompt: int, tokens: int) -> float:
    """Tokens/s that `streams` clients of the load tester see, one request each at a time."""
    command = [sys.executable, "-m", "concertina.cli.main", "loadtest", "--address", address]
    command += ["--streams", str(streams), "--requests", str(streams), "--json", "-"]
    command += ["--prompt-tokens", str(prompt), "--output-tokens", str(tokens), "--max-lag", "1"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rate: float = json.loads(out)["report"]["tokens_per_s"]
    return rate


if __name__ == "__main__":
    typer.run(main)
