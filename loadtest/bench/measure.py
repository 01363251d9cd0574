"""Tokens/s of the engine alone, and of the same streams as gRPC clients see them.

A round goes from the engine over the servers and back, and a share of the engine is the median of
those within a round: see `loadtest.bench.rounds`. docs/performance.md shows them.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from loadtest.bench.adapters.bundles import make_bundle
from loadtest.bench.adapters.ours import generate, open_engine, random_prompt
from loadtest.bench.plan import Shape
from loadtest.bench.rounds import Round, movements, ratio, turns
from loadtest.servers import serving

_STREAMS = (1, 8, 32)
_ENGINE = "engine"
_WARM_UP_TOKENS = 64


def measure(
    bundle: Annotated[
        Path | None,
        typer.Argument(exists=True, help="Bundle to measure; default 25M random weights."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each stream.")] = 512,
    prompt: Annotated[int, typer.Option(min=0, help="Tokens of each prompt.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; medians are printed.")] = 3,
    threads: Annotated[
        int, typer.Option(min=0, help="Of the engine, everywhere; 0 for all cores.")
    ] = 0,
) -> None:
    """Print tokens/s of the engine alone and through gRPC, and the time from start to answer.

    Examples:
    python -m loadtest.bench.measure bundles/python-4k
    python -m loadtest.bench.measure --threads 1   # leaves cores to the clients
    """
    with tempfile.TemporaryDirectory() as root:
        if bundle is None:
            bundle = Path(root) / "bench"
            make_bundle(bundle, Shape(), 1024, 32)
        _measure(bundle, tokens, prompt, rounds, threads)


def _measure(bundle: Path, tokens: int, prompt: int, rounds: int, threads: int) -> None:
    figures: dict[str, list[float]] = {}
    given = ("--threads", str(threads), "--drain-seconds", "2")
    homes = {"ray": given, "local": ("--local", *given)}
    most = max(_STREAMS)
    seen: list[Round] = []
    for _ in range(rounds):
        for streams in _STREAMS[:-1]:
            rate = asyncio.run(_engine(bundle, streams, prompt, tokens, threads))
            figures.setdefault(f"engine, {streams} streams, tokens/s", []).append(rate)
        windows: dict[str, list[float]] = {}
        for name in turns([_ENGINE, *homes]):
            if name == _ENGINE:
                rate = asyncio.run(_engine(bundle, most, prompt, tokens, threads))
            else:
                with serving(bundle, *homes[name]) as server:
                    rate = _clients(server.address, most, prompt, tokens)
                figures.setdefault(f"{name}, ready after, s", []).append(server.ready_s)
            figures.setdefault(f"{name}, {most} streams, tokens/s", []).append(rate)
            windows.setdefault(name, []).append(1 / rate)
        seen.append({name: (w[0], w[1]) for name, w in windows.items()})
    shares = {home: ratio(seen, _ENGINE, home) for home in homes}
    report = {
        "windows": figures,
        "medians": {name: round(statistics.median(f), 2) for name, f in figures.items()},
        "shares of the engine": {home: asdict(s) for home, s in shares.items() if s},
        "doubts": [f"the machine moved too much: {moved}" for moved in movements(seen)],
    }
    print(json.dumps(report, indent=1))


async def _engine(bundle: Path, streams: int, prompt: int, tokens: int, threads: int) -> float:
    """Tokens/s of `streams` streams at once, prompts included, without any server."""
    with open_engine(bundle, slots=streams, threads=threads) as engine:

        async def one(seed: int, count: int) -> int:
            stream = generate(engine, random_prompt(engine, prompt, seed), tokens=count, seed=seed)
            return sum([len(ids) async for ids in stream])

        await asyncio.gather(*(one(seed, _WARM_UP_TOKENS) for seed in range(streams)))
        began = time.perf_counter()
        done = await asyncio.gather(*(one(seed, tokens) for seed in range(streams)))
        return sum(done) / (time.perf_counter() - began)


def _clients(address: str, streams: int, prompt: int, tokens: int) -> float:
    """Tokens/s that `streams` clients of the load tester see, one request each at a time."""
    command = [sys.executable, "-m", "concertina.cli.main", "loadtest", "--address", address]
    command += ["--streams", str(streams), "--requests", str(streams), "--json", "-"]
    command += ["--prompt-tokens", str(prompt), "--output-tokens", str(tokens), "--max-lag", "1"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rate: float = json.loads(out)["report"]["tokens_per_s"]
    return rate


if __name__ == "__main__":
    typer.run(measure)
