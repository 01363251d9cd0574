"""Runs what a body asks for as streams of the server, and tells what comes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

from concertina.client import (
    Accepted,
    AsyncClient,
    AsyncStream,
    Cursor,
    Event,
    Finished,
    FinishReason,
    GenerateParameters,
    PromptLogprobs,
    Tokens,
)
from concertina.client.requests import PromptLike
from server.http.errors import invalid
from server.http.reading.parameters import Wanted
from server.http.upstream import CALL_SECONDS, Upstream
from server.http.writing.vocabulary import Entry

_AT_ONCE: Final = 16  # streams of one request; its other prompts wait
_BUFFERED: Final = 64


@dataclass(frozen=True)
class Began:
    """The server has accepted the stream of a prompt. index: of its first choice."""

    index: int
    accepted: Accepted


@dataclass(frozen=True)
class Piece:
    """More of a choice. entries: its tokens, if log-probabilities are asked for."""

    index: int
    text: str
    entries: tuple[Entry, ...] = ()
    rgb: bytes = b""


@dataclass(frozen=True)
class Ended:
    """A choice is complete. tokens: how many were generated."""

    index: int
    reason: str
    stop: str | None = None
    tokens: int = 0


Update: TypeAlias = Began | Piece | Ended

_REASONS: Final = {FinishReason.END: "stop", FinishReason.STOP: "stop"}


@dataclass(eq=False)
class Cursors:
    """How far each output of a kept stream has come, as the ids of its events say it."""

    outputs: list[Cursor] = field(default_factory=list)

    def take(self, update: Update) -> None:
        """Count what is about to be sent."""
        match update:
            case Began():
                for output in range(len(self.outputs), update.accepted.output.n):
                    self.outputs.append(Cursor(output))
            case Piece():
                known = self.outputs[update.index]
                self.outputs[update.index] = replace(
                    known,
                    tokens=known.tokens + len(update.entries),
                    characters=known.characters + len(update.text),
                )
            case Ended():
                self.outputs[update.index] = replace(self.outputs[update.index], ended=True)

    def has_begun(self, output: int) -> bool:
        """Whether anything of an output has been sent."""
        known = self.outputs[output]
        return bool(known.tokens or known.ended)

    def __str__(self) -> str:
        return "_".join(
            f"{each.tokens}.{each.characters}{'e' if each.ended else ''}" for each in self.outputs
        )


async def updates(
    upstream: Upstream, client: AsyncClient, wanted: Wanted
) -> AsyncGenerator[Update]:
    """What comes of all prompts, mixed. An error of one ends all."""
    if len(wanted.prompts) == 1:
        async with aclosing(_of_prompt(upstream, client, wanted, 0)) as alone:
            async for update in alone:
                yield update
        return
    arrived = asyncio.Queue[Update](_BUFFERED)
    room = asyncio.Semaphore(_AT_ONCE)

    async def run(index: int) -> None:
        async with room, aclosing(_of_prompt(upstream, client, wanted, index)) as one:
            async for update in one:
                await arrived.put(update)

    async def run_all() -> None:
        async with asyncio.TaskGroup() as group:
            for index in range(len(wanted.prompts)):
                group.create_task(run(index))

    running = asyncio.create_task(run_all())
    try:
        while not (running.done() and arrived.empty()):
            taking = asyncio.create_task(arrived.get())
            await asyncio.wait((running, taking), return_when=asyncio.FIRST_COMPLETED)
            if taking.done():
                yield taking.result()
            else:
                taking.cancel()
        if (error := running.exception()) is not None:
            raise _first_error(error)
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError, BaseExceptionGroup):
            await running


def _first_error(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _of_prompt(
    upstream: Upstream, client: AsyncClient, wanted: Wanted, number: int
) -> AsyncGenerator[Update]:
    prompt, first = wanted.prompts[number], number * wanted.n
    starts = False
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        model = await upstream.model(client, wanted.model)
        starts = not model.has_tokenizer and prompt[0] == model.vocabulary
        prompt = (prompt[1:] or None) if starts else prompt
    if wanted.echo:
        async for update in _echoed(upstream, client, wanted, prompt, first, starts):
            yield update
        return
    stream = client.generate(prompt, keep=wanted.keep, **_parameters(wanted))
    async with aclosing(of_stream(stream, first, kept=wanted.keep is not None)) as rest:
        async for update in rest:
            yield update


def _parameters(wanted: Wanted) -> GenerateParameters:
    return {
        **wanted.parameters,
        "model": wanted.model,
        "max_tokens": wanted.max_tokens,
        "logprobs": wanted.logprobs,
    }


async def of_stream(stream: AsyncStream, first: int = 0, *, kept: bool) -> AsyncGenerator[Update]:
    """What comes of one stream. kept: whether it goes on when nobody reads it."""
    try:
        async for event in stream:
            match event:
                case Accepted():
                    yield Began(first, event)
                case Tokens():
                    yield _piece(event, first)
                case Finished():
                    yield _end(event, first)
    finally:
        if kept:
            stream.detach()
        else:
            stream.cancel()


def _piece(event: Tokens, first: int) -> Piece:
    told = event.logprobs or (None,) * len(event.ids)
    entries = tuple(zip(event.ids, told, strict=True))
    return Piece(first + event.output, event.text, entries, event.rgb)


def _end(event: Finished, first: int) -> Ended:
    reason = _REASONS.get(event.reason, "length")
    return Ended(first + event.output, reason, event.stop, event.usage.generated_tokens)


async def _echoed(
    upstream: Upstream,
    client: AsyncClient,
    wanted: Wanted,
    prompt: PromptLike | None,
    first: int,
    starts: bool,
) -> AsyncGenerator[Update]:
    """What comes of a prompt whose text, and log-probabilities, are sent before the output."""
    if prompt is None:
        ids: tuple[int, ...] = ()
        text = ""
    elif isinstance(prompt, str):
        ids = (await client.tokenize(prompt, model=wanted.model, timeout=CALL_SECONDS)).ids
        text = prompt
    else:
        told = await client.detokenize(_ids(prompt), model=wanted.model, timeout=CALL_SECONDS)
        ids, text = told.ids, told.text
    start = ((await upstream.model(client, wanted.model)).vocabulary,) if starts else ()
    if wanted.max_tokens == 0:
        async for update in _scored(client, wanted, ids, text, first, start):
            yield update
        return
    parameters = _parameters(wanted)
    parameters["prompt_logprobs"] = wanted.logprobs
    if wanted.logprobs is not None and wanted.max_tokens == 1:
        # Whoever scores expects one more entry than there are tokens, also for an end token.
        parameters["ignore_eos"] = True
    stream = client.generate(prompt, **parameters)
    events = _with_prompt(_events(stream), ids, start, text, wanted, first)
    async with aclosing(events):
        async for update in events:
            yield update


def _ids(prompt: object) -> list[int]:
    assert isinstance(prompt, list)
    return prompt


async def _events(stream: AsyncStream) -> AsyncGenerator[Event]:
    """The events of a stream, which ends when they are not read to their end."""
    async with stream:
        async for event in stream:
            yield event


async def _with_prompt(
    events: AsyncIterator[Event],
    ids: Sequence[int],
    start: Sequence[int],
    text: str,
    wanted: Wanted,
    first: int,
) -> AsyncGenerator[Update]:
    prompt_logprobs: list[Entry] = []
    waiting: list[Update] = []
    expected = 0
    is_told = False

    def echo() -> list[Update]:
        # What nothing predicts: the start token, and a first token that takes its place.
        unpredicted = [*start, *ids[: len(ids) - expected]]
        entries = (*((token, None) for token in unpredicted), *prompt_logprobs)
        if wanted.logprobs is None:
            entries = ()
        return [Piece(first + output, text, entries) for output in range(wanted.n)]

    async for event in events:
        match event:
            case Accepted():
                expected = event.prompt_tokens
                yield Began(first, event)
            case PromptLogprobs():
                at = len(ids) - expected + event.first_position
                tokens = ids[at : at + len(event.logprobs)]
                prompt_logprobs += zip(tokens, event.logprobs, strict=True)
            case Tokens():
                waiting.append(_piece(event, first))
            case Finished():
                waiting.append(_end(event, first))
        if not is_told and (wanted.logprobs is None or len(prompt_logprobs) == expected):
            is_told = True
            for update in echo():
                yield update
        if is_told:
            for update in waiting:
                yield update
            waiting.clear()


async def _scored(
    client: AsyncClient,
    wanted: Wanted,
    ids: Sequence[int],
    text: str,
    first: int,
    start: Sequence[int],
) -> AsyncGenerator[Update]:
    """The prompt alone. The last token is generated as the only one allowed, so that there are
    log-probabilities up to a full context."""
    if not ids:
        raise invalid("prompt", "prompt is empty: with max_tokens 0 there is nothing to answer")
    most = wanted.logprobs or 0
    stream = client.generate(
        list(ids[:-1]) or None,
        model=wanted.model,
        label=wanted.parameters.get("label"),
        max_tokens=1,
        allowed_token_ids=[ids[-1]],
        ignore_eos=True,
        logprobs=most,
        prompt_logprobs=most,
    )
    events = _with_prompt(_events(stream), ids[:-1], start, "", replace(wanted, n=1), first)
    entries: list[Entry] = []
    async with aclosing(events):
        async for update in events:
            if isinstance(update, Began):
                counted = replace(update.accepted, prompt_tokens=update.accepted.prompt_tokens + 1)
                yield replace(update, accepted=counted)
            elif isinstance(update, Piece):
                entries += update.entries
    told = () if wanted.logprobs is None else tuple(entries)
    for output in range(wanted.n):
        yield Piece(first + output, text, told)
        yield Ended(first + output, "length")
