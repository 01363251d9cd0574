"""Servers are killed under running streams, and every stream has to be as if nothing happened.

The clients resume by themselves. Every stream is compared, token for token, with its twin, which
ran before the first kill.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import typer

from concertina.client import AsyncClient, ConcertinaError, Tokens
from loadtest.scenarios.clusters import Cluster, Processes, Ray
from loadtest.servers import START_LIMIT_S

_STREAM_LIMIT_S = 600.0
_LONG_PROMPTS = (16, 200, 1_200, 1_900)
_PROBES = 3  # after each kill, so many prompts of all known tokens are sent, to compare with


@dataclass(frozen=True)
class Wanted:
    """What a stream is asked for; the same every time it runs."""

    prompt: list[int]
    parameters: dict[str, Any]

    @staticmethod
    def of(index: int, tokens: int) -> Wanted:
        """Prompts of several lengths; every third stream is greedy, every fourth has penalties."""
        rng = random.Random(index)
        prompt = list(rng.randbytes(_LONG_PROMPTS[index % len(_LONG_PROMPTS)]))
        parameters: dict[str, Any] = {"max_tokens": tokens, "ignore_eos": True, "seed": index}
        if index % 3 == 0:
            parameters["temperature"] = 0.0
        if index % 4 == 1:
            parameters |= {"repetition_penalty": 1.1, "frequency_penalty": 0.2}
        return Wanted(prompt, parameters)


@dataclass
class Result:
    """What the clients see, counted while it happens.

    wrong: streams that differ from their twins, or are lost.
    next_token_s, after_both_s: from a kill to a resumed stream's next event, when one server is
        killed, and when both are.
    prefill_s: the time to the next token of a new request with all known tokens as its prompt.
    """

    kills: int = 0
    killed_at_once: int = 0
    streams: int = 0
    resumed: int = 0
    begun_again: int = 0
    wrong: list[str] = field(default_factory=list)
    killed_at: float = 0.0
    killed_both: bool = False
    next_token_s: list[float] = field(default_factory=list)
    after_both_s: list[float] = field(default_factory=list)
    prefill_s: list[float] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        """For JSON; times as median and 99th percentile."""
        counts = ("kills", "killed_at_once", "streams", "resumed", "begun_again", "wrong")
        report = {name: getattr(self, name) for name in counts}
        for name in ("next_token_s", "after_both_s", "prefill_s"):
            times = sorted(getattr(self, name))
            if times:
                p99 = times[min(len(times) - 1, int(0.99 * len(times)))]
                report[name] = {
                    "samples": len(times),
                    "p50": round(statistics.median(times), 3),
                    "p99": round(p99, 3),
                }
        return report


def chaos(
    bundle: Annotated[Path, typer.Argument(exists=True, help="Bundle to serve.")],
    kills: Annotated[int, typer.Option(min=1, help="How often a server is killed.")] = 20,
    streams: Annotated[int, typer.Option(min=1, help="Streams that run at once.")] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each stream.")] = 2_000,
    ray: Annotated[bool, typer.Option(help="Two replicas on Ray Serve behind HAProxy.")] = False,
    seed: Annotated[int, typer.Option(help="Of the moments of the kills.")] = 1,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON.")
    ] = None,
) -> None:
    """Kill servers under running streams, and compare every stream with an undisturbed one.

    Two servers share a store of snapshots. As soon as both answer, one is killed at a random
    moment, every fifth time both. Exit code 1 when a stream differs or is lost.

    Examples:
    python -m loadtest.scenarios.chaos bundles/python-4k --kills 2
    python -m loadtest.scenarios.chaos bundles/python-4k --ray --json build/chaos-ray.json
    """
    result = run(bundle, kills, streams, tokens, ray=ray, seed=seed)
    report = {"home": "ray" if ray else "two processes", "tokens": tokens, **result.report()}
    print(json.dumps(report, indent=1))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    if result.wrong:
        raise typer.Exit(1)


def run(bundle: Path, kills: int, streams: int, tokens: int, *, ray: bool, seed: int) -> Result:
    """Serve, kill, compare, and leave no process behind."""
    with tempfile.TemporaryDirectory(prefix="chaos-") as store:
        cluster = Ray(bundle, Path(store)) if ray else Processes(bundle, Path(store))
        with cluster.running():
            wanted = [Wanted.of(index, tokens) for index in range(streams)]
            return asyncio.run(_storm(cluster, wanted, kills, random.Random(seed)))


async def _storm(cluster: Cluster, wanted: list[Wanted], kills: int, rng: random.Random) -> Result:
    await _healthy(cluster)
    result = Result()
    async with _clients(cluster) as clients:
        pick = [clients[index % len(clients)] for index in range(len(wanted))]
        runs = (_read(pick[i], one, result) for i, one in enumerate(wanted))
        twins = await asyncio.gather(*runs)
        assert not result.resumed
        over = asyncio.Event()

        async def keep_running(index: int) -> None:
            while not over.is_set():
                got = await _read(pick[index], wanted[index], result)
                result.streams += 1
                if got != twins[index]:
                    same = (a == b for a, b in zip(got[0], twins[index][0], strict=False))
                    at = sum(takewhile(bool, same))
                    result.wrong.append(f"stream {index} differs from token {at} on")

        running = [asyncio.create_task(keep_running(index)) for index in range(len(wanted))]
        try:
            for _ in range(kills):
                await _healthy(cluster)
                await asyncio.sleep(rng.uniform(0.5, 4.0))
                both = (result.kills + 1) % 5 == 0 or (kills < 5 and result.kills == kills - 1)
                result.killed_at, result.killed_both = time.monotonic(), both
                await asyncio.to_thread(cluster.kill, rng, both)
                result.kills += 1
                result.killed_at_once += both
            await _healthy(cluster)
        finally:
            over.set()
        ended = await asyncio.gather(*running, return_exceptions=True)
        result.wrong += [f"a stream was lost: {e}" for e in ended if isinstance(e, Exception)]
    return result


async def _healthy(cluster: Cluster) -> None:
    async with asyncio.timeout(START_LIMIT_S):
        while not await asyncio.to_thread(cluster.is_healthy):
            await asyncio.sleep(0.1)


@asynccontextmanager
async def _clients(cluster: Cluster) -> AsyncIterator[list[AsyncClient]]:
    clients = [AsyncClient(address) for address in cluster.addresses]
    try:
        yield clients
    finally:
        for client in clients:
            await client.close()


async def _read(client: AsyncClient, wanted: Wanted, result: Result) -> tuple[list[int], str]:
    """Read a stream to its end: ids and text. Events have to be without gap or repetition."""
    async with asyncio.timeout(_STREAM_LIMIT_S):
        while True:
            try:
                return await _read_once(client, wanted, result)
            except _NotBegunError:
                result.begun_again += 1
                await asyncio.sleep(0.5)


class _NotBegunError(Exception):
    """The stream ended before its first token."""


async def _read_once(client: AsyncClient, wanted: Wanted, result: Result) -> tuple[list[int], str]:
    ids, text, resumed = list[int](), "", 0
    probe: asyncio.Task[None] | None = None
    try:
        stream = client.generate(wanted.prompt, resume_for=START_LIMIT_S, **wanted.parameters)
        async for event in stream:
            if isinstance(event, Tokens):
                if event.first_position != len(wanted.prompt) + len(ids):
                    raise AssertionError(f"position {event.first_position} after {len(ids)} tokens")
                ids += event.ids
                text += event.text
            if stream.resumed > resumed:
                resumed = stream.resumed
                result.resumed += 1
                waited = time.monotonic() - result.killed_at
                times = result.after_both_s if result.killed_both else result.next_token_s
                times.append(waited)
                if len(result.prefill_s) < _PROBES * (result.kills + 1):
                    known = [*wanted.prompt, *ids]
                    probe = asyncio.create_task(_prefill(client, known, result))
    except ConcertinaError as error:
        if not ids:
            raise _NotBegunError from error
        raise
    finally:
        if probe is not None:
            await probe
    return ids, text


async def _prefill(client: AsyncClient, known: list[int], result: Result) -> None:
    """Time the next token after all known ones, as a new request."""
    began = time.monotonic()
    try:
        async for event in client.generate(
            known, max_tokens=1, ignore_eos=True, keep=0, timeout=60
        ):
            if isinstance(event, Tokens):
                result.prefill_s.append(time.monotonic() - began)
    except ConcertinaError:
        return  # its server was killed, too


if __name__ == "__main__":
    typer.run(chaos)
