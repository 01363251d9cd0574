"""Streams over OpenAI's completions, of our gateway or of any peer, by the same clock."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter_ns
from typing import Any, Final

import aiohttp

from concertina.client import InvalidRequest, ModelNotFound, ServerUnavailable
from concertina.client.channel import KEY_VARIABLE, Access, Tls
from concertina.shown import shown
from loadtest.record import CANCELLED, REFUSED, Record
from loadtest.target import Served, Tally, Target
from loadtest.workload import Request

_MODELS_TIMEOUT_S: Final = 10.0
_VOCABULARY: Final = 256  # the API does not tell it; so many ids every model has
_DONE: Final = "[DONE]"


@asynccontextmanager
async def openai_target(
    address: str, model: str, access: Access, *, timeout_s: float
) -> AsyncIterator[Target]:
    """A server of OpenAI's API; its connections are as many as streams run.

    address: with or without `http://` and `/v1`. Raises what `AsyncClient.model` raises.
    """
    url = _url(address, access.tls is not None)
    key = (os.environ.get(KEY_VARIABLE, "") if access.key is None else access.key).strip()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    connector = aiohttp.TCPConnector(limit=0, ssl=_ssl(access.tls) if access.tls else True)
    timeout = aiohttp.ClientTimeout(total=timeout_s, sock_read=None)
    async with aiohttp.ClientSession(
        connector=connector, headers=headers, timeout=timeout
    ) as session:
        served = await _served(session, url, model)
        yield Target(served, (partial(_send, session, f"{url}/completions", served.name),))


def _url(address: str, tls: bool) -> str:
    url = address if "://" in address else f"{'https' if tls else 'http'}://{address}"
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


def _ssl(tls: Tls) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=tls.ca)
    if tls.cert is not None:
        context.load_cert_chain(tls.cert, tls.cert_key)
    return context


async def _served(session: aiohttp.ClientSession, url: str, name: str) -> Served:
    timeout = aiohttp.ClientTimeout(total=_MODELS_TIMEOUT_S)
    try:
        async with session.get(f"{url}/models", timeout=timeout) as response:
            if response.status != 200:
                said = await response.text()
                raise ServerUnavailable(f"{url}/models answers {response.status}: {shown(said)}")
            models = {each["id"]: each for each in (await response.json(content_type=None))["data"]}
    except (aiohttp.ClientError, TimeoutError) as error:
        said = str(error) or type(error).__name__
        raise ServerUnavailable(f"nobody answers at {url}: {said}") from None
    except (ValueError, KeyError, TypeError):
        raise ServerUnavailable(f"{url}/models is no list of models; is it OpenAI's API?") from None
    if not name and len(models) != 1:
        raise InvalidRequest(f"{url} serves {len(models)} models: choose one with --model")
    name = name or next(iter(models))
    if name not in models:
        raise ModelNotFound(f"{url} serves no model {shown(name)}, but {', '.join(models)}")
    context = models[name].get("max_model_len")
    return Served(name, _VOCABULARY, context=context if isinstance(context, int) else None)


@dataclass(slots=True)
class _Stream:
    """What has come of a stream so far. The API counts tokens only at the end."""

    stream_id: str = ""
    accepted_ns: int | None = None
    tokens_ns: list[int] = field(default_factory=list)
    ended_ns: int | None = None
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    failure: str = ""
    violation: str = ""
    retry_after_s: float | None = None


async def _send(
    session: aiohttp.ClientSession,
    url: str,
    model: str,
    request: Request,
    due_ns: int,
    tally: Tally,
) -> Record:
    """As `Send` says."""
    body = {
        "model": model,
        "prompt": request.prompt or "",
        "max_tokens": request.output_tokens,
        "seed": request.seed,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    stream = _Stream()
    tally.running += 1
    started_ns = perf_counter_ns()
    try:
        async with session.post(url, json=body) as response:
            if response.status != 200:
                await _refused(stream, response)
            else:
                await _read(stream, response, tally)
    except TimeoutError:
        stream.failure = "DeadlineExceeded"
    except aiohttp.ClientConnectorError:
        stream.failure = "ServerUnavailable"
    except (aiohttp.ClientError, OSError) as error:
        if stream.accepted_ns is None:
            stream.failure = type(error).__name__
        elif not stream.failure:
            stream.violation = f"the stream was cut: {error or type(error).__name__}"
    except asyncio.CancelledError:
        stream.failure = CANCELLED
    finally:
        tally.running -= 1
        tally.ended += 1
    return _record(stream, request, due_ns, started_ns)


async def _refused(stream: _Stream, response: aiohttp.ClientResponse) -> None:
    stream.failure = REFUSED if response.status == 429 else f"HTTP {response.status}"
    try:
        stream.retry_after_s = float(response.headers.get("Retry-After", ""))
    except ValueError:
        stream.retry_after_s = None
    await response.read()


async def _read(stream: _Stream, response: aiohttp.ClientResponse, tally: Tally) -> None:
    rest = b""
    async for part in response.content.iter_any():
        now_ns = perf_counter_ns()  # before anything is parsed
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                _take(stream, line[5:].strip().decode(), now_ns, tally)
    if stream.ended_ns is None and not stream.failure:
        stream.violation = stream.violation or "the stream ended without [DONE]"


def _take(stream: _Stream, data: str, now_ns: int, tally: Tally) -> None:
    if stream.accepted_ns is None:
        stream.accepted_ns = now_ns
    if stream.ended_ns is not None:
        stream.violation = "an event follows [DONE]"
        return
    if data == _DONE:
        stream.ended_ns = now_ns
        return
    try:
        event = json.loads(data)
        if "error" in event:
            stream.failure = f"Error event {event['error'].get('code') or ''}".rstrip()
            return
        stream.stream_id = str(event.get("id") or stream.stream_id)
        stream.usage = event.get("usage") or stream.usage
        for choice in event.get("choices") or ():
            if choice.get("text"):
                stream.tokens_ns.append(now_ns)
                tally.tokens += 1
            stream.finish_reason = choice.get("finish_reason") or stream.finish_reason
    except (ValueError, AttributeError, TypeError):
        stream.violation = f"an event is no completion: {shown(data)}"


def _record(stream: _Stream, request: Request, due_ns: int, started_ns: int) -> Record:
    generated = stream.usage.get("completion_tokens")
    violation = stream.violation
    if not stream.failure and not violation:
        violation = _miscount(stream, request)
    events = len(stream.tokens_ns)
    tokens = generated if isinstance(generated, int) else events
    prompt_tokens = stream.usage.get("prompt_tokens")
    return Record(
        stream_id=stream.stream_id,
        due_ns=due_ns,
        started_ns=started_ns,
        accepted_ns=stream.accepted_ns,
        tokens_ns=tuple(stream.tokens_ns),
        counts=_spread(tokens, events),
        ended_ns=stream.ended_ns or perf_counter_ns(),
        prompt_tokens=prompt_tokens if isinstance(prompt_tokens, int) else 0,
        failure=stream.failure,
        retry_after_s=stream.retry_after_s,
        violation=violation,
    )


def _spread(tokens: int, events: int) -> tuple[int, ...]:
    """Tokens of each event, as even as they can be: nothing says how they were."""
    return tuple(
        tokens * (index + 1) // events - tokens * index // events for index in range(events)
    )


def _miscount(stream: _Stream, request: Request) -> str:
    """What a stream that ended lacks; empty if nothing. A peer may ignore `ignore_eos`."""
    if stream.finish_reason is None:
        return "the stream ended without a finish_reason"
    if not stream.tokens_ns:
        return "the stream ended without a text"
    generated = stream.usage.get("completion_tokens")
    if not isinstance(generated, int):
        return "the stream ended without a usage, so nobody knows how many tokens it has"
    if generated != request.output_tokens and stream.finish_reason != "stop":
        return f"{generated} tokens arrived, {request.output_tokens} were asked for"
    return ""
