"""Drives an engine in tests: submits and reads streams, stops its thread, changes its logits."""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np

from concertina.codecs.token_text import TokenText
from server.arrays import Floats, Ints
from server.engine.stream import Stream
from server.engine.updates import Ending
from server.request import Lease, Request, SamplingParameters, prompt_of
from server.sessions.served_model import ServedModel
from server.sessions.subscriber import Delta, Event
from server.sessions.table import Session

LIMIT_S = float(os.environ.get("LIMIT_S", "60"))
START = 256
BYTES = TokenText(tuple(bytes((token,)) for token in range(256)))
GREEDY = SamplingParameters(temperature=0)


class DrivenModel(ServedModel):
    """A served model whose streams are opened, read and cancelled one by one."""

    def submit(self, request: Request, owner: str = "") -> Stream:  # type: ignore[override]
        """Queues a stream."""
        return self.submit_together([request], owner)[0]

    def submit_together(self, requests: Sequence[Request], owner: str = "") -> tuple[Stream, ...]:
        """Queues the outputs of one request."""
        return self.open(Lease(secrets.token_hex(16), tuple(requests), owner)).streams

    async def events(self, *streams: Stream) -> AsyncIterator[Event]:  # type: ignore[override]
        """The events of one stream."""
        async for _, event in self.events_together(streams):
            yield event

    async def events_together(
        self, streams: Sequence[Stream]
    ) -> AsyncIterator[tuple[Stream, Event]]:
        """The events of the streams of one request."""
        subscribers = tuple(each.subscriber.members[0] for each in streams)  # type: ignore[attr-defined]
        session = Session(streams[0].lease, tuple(streams), (), subscribers, [])
        async for pair in super().events(session):
            yield pair

    def cancel(self, stream: Stream) -> None:  # type: ignore[override]
        """Drops a stream."""
        self.engine.post(lambda: self.engine.streams.cancel(stream))


@dataclass(frozen=True)
class Outcome:
    """Everything that the reader of a stream received."""

    tokens: tuple[int, ...]
    text: str
    ending: Ending


def ask(prompt: bytes = b"", max_tokens: int = 8, seed: int = 1, **fields: Any) -> Request:
    """A request to a text model."""
    fields.setdefault("sampling", SamplingParameters(seed=seed))
    return Request(prompt_of(START, [*prompt], "B"), max_tokens=max_tokens, **fields)


async def read(model: DrivenModel, stream: Stream) -> Outcome:
    """Reads a stream to its end. Checks that deltas are consecutive and the ending is last."""
    tokens: list[int] = []
    text, ending = "", None
    async with asyncio.timeout(LIMIT_S):
        async for event in model.events(stream):
            assert ending is None
            if isinstance(event, Delta):
                assert event.first_position == len(stream.request.prompt) + len(tokens)
                assert event.tokens or event.text
                tokens += event.tokens
                text += event.text
            else:
                ending = event
    assert ending is not None
    return Outcome(tuple(tokens), text, ending)


async def generate(model: DrivenModel, wanted: Request) -> Outcome:
    """Submits a request and reads its stream."""
    return await read(model, model.submit(wanted))


async def until(condition: Callable[[], object], limit_s: float = LIMIT_S) -> None:
    """Waits until another thread makes `condition` true."""
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.001)


def is_empty(model: ServedModel) -> bool:
    """Whether the model holds no stream and no session."""
    return model.is_empty and not model.table.num_left


@contextmanager
def together(model: ServedModel) -> Iterator[None]:
    """Streams submitted in this context reach the engine at once."""
    ready = threading.Event()

    def wait() -> None:
        assert ready.wait(LIMIT_S)

    model.engine.post(wait)
    try:
        yield
    finally:
        ready.set()


class Gate:
    """Stops an engine before each pass of its model until the test lets it continue.

    While the thread stands still, tests can read what it owns.
    """

    def __init__(self, model: ServedModel) -> None:
        self.passes = 0
        self._changed = threading.Condition()
        self._permits = 0.0
        self.standing: str | None = None
        self._runtime: Any = model.engine.runtime
        self._passes = {name: getattr(self._runtime, name) for name in ("step", "prefill")}

    def __enter__(self) -> Gate:
        for name, run in self._passes.items():
            setattr(self._runtime, name, self._gated(name, run))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, run in self._passes.items():
            setattr(self._runtime, name, run)
        self.let(float("inf"))

    def _gated(self, name: str, run: Callable[..., Floats]) -> Callable[..., Floats]:
        def gated(*args: Any) -> Floats:
            with self._changed:
                self.standing = name
                assert self._changed.wait_for(lambda: self._permits > 0, LIMIT_S)
                self.standing = None
                self.passes += 1
                self._permits -= 1
            return run(*args)

        return gated

    def let(self, passes: float) -> None:
        """Lets the engine run some passes."""
        with self._changed:
            self._permits += passes
            self._changed.notify_all()

    async def held(self, name: str) -> None:
        """Waits until the engine stops before a pass: a `step` or a `prefill`."""
        await until(lambda: self._permits == 0 and self.standing == name)

    async def let_one(self, name: str) -> None:
        """Lets the engine run one pass, and waits until it stops before the next one, a `name`."""
        self.let(1)
        await self.held(name)


def script(model: ServedModel, content: Sequence[int]) -> None:
    """Makes the model generate `content`: the token at position k is `content[k]`."""
    wanted = np.array([*content])

    def scripted(logits: Floats, positions: Ints) -> Floats:
        logits = np.zeros_like(logits)
        logits[np.arange(len(positions)), wanted[positions]] = 1e4
        return logits

    change_logits(model, scripted)


def change_logits(model: ServedModel, change: Callable[[Floats, Ints], Floats]) -> None:
    """Replaces the logits of each step with `change(logits, positions)`."""
    runtime: Any = model.engine.runtime
    step = runtime.step

    def changed(tokens: Ints, positions: Ints, lengths: Ints) -> Floats:
        return change(step(tokens, positions, lengths), positions)

    runtime.step = changed
