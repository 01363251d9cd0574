"""Servers are killed under running streams, and every stream has to be as if nothing happened.

The clients resume by themselves. Every stream is compared, token for token, with its twin, which
ran before the first kill. The store of the servers may fail at random, too: then a stream may be
lost by a kill, if its client was told that it is not durable, and it was not in the store yet.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any

import typer

from concertina.client import (
    Accepted,
    AsyncClient,
    AsyncStream,
    ConcertinaError,
    Event,
    Tokens,
)
from loadtest.scenarios.bucket import Bucket, Trouble
from loadtest.scenarios.clusters import Cluster, Processes, Ray, Store
from loadtest.scenarios.result import Kill, Result
from loadtest.servers import START_LIMIT_S

_STREAM_LIMIT_S = 900.0
_RESUME_FOR_S = 300.0  # servers that start, while the store hangs, again and again
_SILENCE_LIMIT_S = _RESUME_FOR_S + 60.0  # an event, or an error, has to come within this
_LONG_PROMPTS = (16, 200, 1_200, 1_900)
_PROBES = 3  # after each kill, so many prompts of all known tokens are sent, to compare with
_ACCEPTANCE_LIMIT_S = 45.0  # two or three operations of the store, of at most ten seconds each
_FINE_S = (2.0, 10.0)
_TROUBLES = {  # how long each lasts, and how often it comes
    (Trouble.REFUSES, (0.5, 6.0)): 3,
    (Trouble.CUTS, (0.5, 6.0)): 3,
    (Trouble.LOSES, (0.5, 6.0)): 3,
    (Trouble.SLOWS, (1.0, 8.0)): 2,
    (Trouble.HANGS, (0.5, 8.0)): 2,
    (Trouble.HANGS, (12.0, 18.0)): 2,
    (Trouble.HANGS, (50.0, 60.0)): 1,
}


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


def chaos(
    bundle: Annotated[Path, typer.Argument(exists=True, help="Bundle to serve.")],
    kills: Annotated[int, typer.Option(min=0, help="How often a server is killed.")] = 20,
    streams: Annotated[int, typer.Option(min=1, help="Streams that run at once.")] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each stream.")] = 2_000,
    ray: Annotated[bool, typer.Option(help="Two replicas on Ray Serve behind HAProxy.")] = False,
    store_fails: Annotated[
        bool,
        typer.Option(
            "--store-fails",
            help="The store, a bucket that speaks as S3 does, fails at random for moments: it "
            "refuses, breaks connections, loses answers, is slow, or hangs.",
        ),
    ] = False,
    seconds: Annotated[
        float, typer.Option(min=0, help="Least time that it runs, also after the last kill.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the moments of the kills and failures.")] = 1,
    logs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write there what the servers print.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report as JSON.")
    ] = None,
) -> None:
    """Kill servers under running streams, and compare every stream with an undisturbed one.

    Two servers share a store of snapshots. As soon as both answer, one is killed at a random
    moment, every fifth time both. Exit code 1 when a stream differs or is lost; only one that was
    said not to be durable, and was not in the store yet, may be lost by a kill.

    Examples:
    python -m loadtest.scenarios.chaos bundles/python-4k --kills 2
    python -m loadtest.scenarios.chaos bundles/python-4k --ray --json build/chaos-ray.json
    python -m loadtest.scenarios.chaos bundles/python-4k --store-fails
    python -m loadtest.scenarios.chaos bundles/python-4k --store-fails --kills 0 --seconds 120
    """
    result, bucket = run(
        bundle,
        kills,
        streams,
        tokens,
        ray=ray,
        store_fails=store_fails,
        seconds=seconds,
        seed=seed,
        logs=logs,
    )
    report = {"home": "ray" if ray else "two processes", "tokens": tokens, **result.report()}
    if bucket is not None:
        report |= {"store_moments": bucket.moments, "store_requests": bucket.requests}
    print(json.dumps(report, indent=1))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    if result.wrong:
        raise typer.Exit(1)


def run(
    bundle: Path,
    kills: int,
    streams: int,
    tokens: int,
    *,
    ray: bool = False,
    store_fails: bool = False,
    seconds: float = 0.0,
    seed: int = 1,
    logs: Path | None = None,
) -> tuple[Result, Bucket | None]:
    """Serve, kill, compare, and leave no process behind. Also the bucket, if the store fails."""
    with _store(store_fails) as (store, bucket):
        cluster = Ray(bundle, store, logs) if ray else Processes(bundle, store, logs)
        with cluster.running():
            wanted = [Wanted.of(index, tokens) for index in range(streams)]
            storm = _storm(cluster, bucket, wanted, kills, seconds, random.Random(seed))
            return asyncio.run(storm), bucket


@contextmanager
def _store(fails: bool) -> Iterator[tuple[Store, Bucket | None]]:
    if fails:
        bucket = Bucket()
        with bucket.running():
            yield Store(bucket.uri, bucket.environment, fails=True), bucket
    else:
        with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
            yield Store(f"file://{folder}"), None


async def _storm(
    cluster: Cluster,
    bucket: Bucket | None,
    wanted: list[Wanted],
    kills: int,
    seconds: float,
    rng: random.Random,
) -> Result:
    await _healthy(cluster)
    result = Result()
    async with _clients(cluster) as clients:
        pick = [clients[index % len(clients)] for index in range(len(wanted))]
        runs = (_read(pick[i], one, result) for i, one in enumerate(wanted))
        twins = await asyncio.gather(*runs)
        assert not (result.resumed or result.not_durable)
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
        spoiling = asyncio.create_task(_spoil(bucket, over, random.Random(rng.random())))
        until = time.monotonic() + seconds
        try:
            for _ in range(kills):
                await _healthy(cluster)
                await asyncio.sleep(rng.uniform(0.5, 4.0))
                while bucket is not None and not (bucket.fails or result.kills % 2):
                    await asyncio.sleep(0.05)  # every second kill finds the store failing
                both = (result.kills + 1) % 5 == 0 or (kills < 5 and result.kills == kills - 1)
                stored = await asyncio.to_thread(bucket.streams) if bucket else set()
                result.killed.append(Kill(time.monotonic(), both, frozenset(stored)))
                await asyncio.to_thread(cluster.kill, rng, both)
                result.kills += 1
                result.killed_at_once += both
            await _healthy(cluster)
            await asyncio.sleep(until - time.monotonic())
        finally:
            over.set()
            await spoiling
        ended = await asyncio.gather(*running, return_exceptions=True)
        result.wrong += [f"a stream was lost: {e!r}" for e in ended if isinstance(e, Exception)]
    return result


async def _spoil(bucket: Bucket | None, over: asyncio.Event, rng: random.Random) -> None:
    """Let the bucket fail for moments, all of it or a part, until it is over."""
    works = True
    while bucket is not None and not over.is_set():
        works = not works
        (troubled,) = rng.choices([*_TROUBLES], [*_TROUBLES.values()])
        trouble, lasts_s = (Trouble.NONE, _FINE_S) if works else troubled
        bucket.fail(trouble, share=rng.choice((0.3, 1.0)))
        with suppress(TimeoutError):
            async with asyncio.timeout(rng.uniform(*lasts_s)):
                await over.wait()
    if bucket is not None:
        bucket.fail(Trouble.NONE)


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
            except _BeginAgainError:
                await asyncio.sleep(0.5)


class _BeginAgainError(Exception):
    """The call was refused, or the stream was lost, and that was right."""


async def _read_once(client: AsyncClient, wanted: Wanted, result: Result) -> tuple[list[int], str]:
    ids, text, resumed = list[int](), "", 0
    probe: asyncio.Task[None] | None = None
    accepted: Accepted | None = None
    asked_at = time.monotonic()
    try:
        stream = client.generate(wanted.prompt, resume_for=_RESUME_FOR_S, **wanted.parameters)
        async for event in _spoken(stream):
            if isinstance(event, Accepted):
                accepted = event
                result.accepted(time.monotonic() - asked_at, _ACCEPTANCE_LIMIT_S)
                result.not_durable += not event.durable
            if isinstance(event, Tokens):
                if event.first_position != len(wanted.prompt) + len(ids):
                    raise AssertionError(f"position {event.first_position} after {len(ids)} tokens")
                ids += event.ids
                text += event.text
            if stream.resumed > resumed:
                resumed = stream.resumed
                result.resumed += 1
                result.went_on()
                if len(result.prefill_s) < _PROBES * (result.kills + 1):
                    known = [*wanted.prompt, *ids]
                    probe = asyncio.create_task(_prefill(client, known, result))
    except ConcertinaError as error:
        if accepted is None:
            result.begun_again[error.code] += 1
            raise _BeginAgainError from error
        if error.code == "NOT_FOUND" and result.may_lose(accepted, asked_at):
            result.lost += 1
            raise _BeginAgainError from error
        raise
    finally:
        if probe is not None:
            await probe
    return ids, text


async def _spoken(stream: AsyncStream) -> AsyncIterator[Event]:
    """The events of a stream. Raises TimeoutError when none comes for too long."""
    while True:
        async with asyncio.timeout(_SILENCE_LIMIT_S):
            try:
                event = await anext(stream)
            except StopAsyncIteration:
                return
        yield event


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
