"""Streams over our own API, each event checked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from time import perf_counter_ns

from concertina.client import (
    Accepted,
    AsyncClient,
    ConcertinaError,
    ContractViolation,
    Finished,
    StreamCut,
    Tokens,
)
from concertina.client.channel import Access
from concertina.v1 import bundle_pb2, model_service_pb2, model_service_pb2_grpc
from loadtest.record import CANCELLED, Record
from loadtest.target import Send, Served, Tally, Target
from loadtest.workload import Request

_MODEL_TIMEOUT_S = 10.0


@asynccontextmanager
async def concertina_target(
    address: str, model: str, access: Access, *, channels: int, timeout_s: float, keep_s: float
) -> AsyncIterator[Target]:
    """A server of our API over so many connections. Raises what `AsyncClient.model` raises."""
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(AsyncClient(address, key=access.key, tls=access.tls))
            for _ in range(channels)
        ]
        served = await clients[0].model(model, timeout=_MODEL_TIMEOUT_S)
        yield Target(
            Served(
                name=served.name,
                fingerprint=served.fingerprint,
                vocabulary=served.vocabulary,
                context=served.context,
                begin_token=served.begin_token,
                has_begin=served.counts_first_token,
                manifest=await _manifest(address, served.name, access),
            ),
            tuple(_sender(client, model, timeout_s, keep_s) for client in clients),
        )


async def _manifest(address: str, model: str, access: Access) -> bundle_pb2.Manifest:
    async with access.async_channel(address) as channel:
        stub = access.calls(model_service_pb2_grpc.ModelServiceStub(channel))
        request = model_service_pb2.GetModelRequest(model=model)
        response = await stub.GetModel(request, timeout=_MODEL_TIMEOUT_S)
    manifest: bundle_pb2.Manifest = response.model.manifest
    return manifest


def _sender(client: AsyncClient, model: str, timeout_s: float, keep_s: float) -> Send:
    return partial(_send, client, model, timeout_s, keep_s)


async def _send(
    client: AsyncClient,
    model: str,
    timeout_s: float,
    keep_s: float,
    request: Request,
    due_ns: int,
    tally: Tally,
) -> Record:
    """As `Send` says. keep_s: how long the server keeps a lost stream; 0: it ends with its call."""
    accepted: Accepted | None = None
    finished: Finished | None = None
    accepted_ns: int | None = None
    ended_ns: int | None = None
    tokens_ns: list[int] = []
    counts: list[int] = []
    failure = violation = ""
    retry_after_s: float | None = None
    resumed = 0

    tally.running += 1
    started_ns = perf_counter_ns()
    try:
        async with client.generate(
            request.prompt,
            timeout=timeout_s,
            keep=keep_s,
            model=model,
            seed=request.seed,
            max_tokens=request.output_tokens,
            ignore_eos=True,
        ) as stream:
            async for event in stream:
                now_ns, resumed = perf_counter_ns(), stream.resumed
                match event:
                    case Accepted():
                        accepted, accepted_ns = event, now_ns
                    case Tokens(ids=ids):
                        tokens_ns.append(now_ns)
                        counts.append(len(ids))
                        tally.tokens += len(ids)
                    case Finished():
                        finished, ended_ns = event, now_ns
    except (ContractViolation, StreamCut) as error:
        violation = str(error)
    except ConcertinaError as error:
        failure = f"{type(error).__name__} {error.code}".rstrip()
        retry_after_s = error.retry_after
    except asyncio.CancelledError:
        failure = CANCELLED
    finally:
        tally.running -= 1
        tally.ended += 1

    if not failure and not violation and accepted:
        violation = _miscount(request, accepted.prompt_tokens, sum(counts))
    return Record(
        stream_id=accepted.stream_id if accepted else "",
        due_ns=due_ns,
        started_ns=started_ns,
        accepted_ns=accepted_ns,
        tokens_ns=tuple(tokens_ns),
        counts=tuple(counts),
        ended_ns=ended_ns or perf_counter_ns(),
        prompt_tokens=accepted.prompt_tokens if accepted else 0,
        failure=failure,
        retry_after_s=retry_after_s,
        violation=violation,
        resumed=resumed,
        queue_s=finished.usage.queue_time if finished else None,
        state_bytes=finished.usage.state_bytes if finished else None,
    )


def _miscount(request: Request, prompt_tokens: int, output_tokens: int) -> str:
    """How a finished stream's numbers of tokens differ from the request; empty if they do not.

    Text prompts are not counted: only the server knows how many tokens they are.
    """
    asked = None
    if not isinstance(request.prompt, str):
        asked = len(request.prompt or ()) - (not request.first_counts)
    if asked is not None and prompt_tokens != asked:
        return f"the server counts {prompt_tokens} prompt tokens, {asked} were sent"
    if output_tokens != request.output_tokens:
        return f"{output_tokens} tokens arrived, {request.output_tokens} were asked for"
    return ""
