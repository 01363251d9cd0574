"""How fast a reader wants its tokens: who takes them slowly fills the buffers of its stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace
from typing import Final

from concertina.client import Accepted, AsyncClient, AsyncStream, Cursor, Event, Tokens

RESUME_SECONDS: Final = 60.0
"""How long a stream that is lost may take to go on."""

_MOST_PACES: Final = 4096
_LAG_SECONDS: Final = 0.5


@dataclass(eq=False)
class Pace:
    """The pace of one reader.

    per_second: None lets tokens go as they come, 0 holds them. lost_at: when the server of the
    stream was killed, by `time.monotonic`.
    """

    per_second: float | None = None
    lost_at: float = float("-inf")
    _due: float = 0.0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def change(self, per_second: float | None) -> None:
        """Go on at another pace."""
        self.per_second = per_second
        self._due = 0.0
        self._changed.set()

    async def turn(self) -> None:
        """Wait until the next token may go."""
        loop = asyncio.get_running_loop()
        while (rate := self.per_second) is not None:
            now = loop.time()
            if rate > 0 and now >= self._due:
                # A reader that fell behind, since the next token came late, need not catch up.
                kept = now - self._due < 1 / rate
                self._due = (self._due if kept else now) + 1 / rate
                return
            self._changed.clear()
            try:
                async with asyncio.timeout(self._due - now if rate > 0 else None):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def seconds(self, tokens: int) -> float:
        """How long so many tokens take."""
        if self.per_second is None:
            return 0.0
        return tokens / self.per_second if self.per_second else float("inf")

    def parts(self, event: Tokens) -> list[Tokens]:
        """The event, or an event for each of its tokens if they go one by one."""
        if self.per_second is None or len(event.ids) < 2:
            return [event]
        last = len(event.ids) - 1
        return [
            replace(
                event,
                first_position=event.first_position + index,
                ids=(token,),
                text=event.text if index == last else "",
                rgb=event.rgb[3 * index : 3 * index + 3],
                logprobs=event.logprobs[index : index + 1],
            )
            for index, token in enumerate(event.ids)
        ]


@dataclass(eq=False)
class Paces:
    """The paces of the streams that this gateway sends to pages. It belongs to one event loop."""

    _paces: dict[tuple[str, str], Pace] = field(default_factory=dict)

    def of(self, key: str, stream_id: str) -> Pace | None:
        """The pace of a stream, if it is read here with that API key."""
        return self._paces.get((key, stream_id))

    def keep(self, key: str, stream_id: str, pace: Pace) -> None:
        """Remember the pace of a stream, in place of that of an earlier reader."""
        while len(self._paces) >= _MOST_PACES:
            del self._paces[next(iter(self._paces))]
        self._paces[key, stream_id] = pace

    def lose(self, stream_id: str, at: float) -> None:
        """Remember when the server of a stream was killed, for all who read it."""
        for (_, name), pace in self._paces.items():
            if name == stream_id:
                pace.lost_at = at

    def drop(self, key: str, stream_id: str, pace: Pace) -> None:
        """Forget a pace, unless another reader has come to the stream since."""
        if self._paces.get((key, stream_id)) is pace:
            del self._paces[key, stream_id]


async def read_slowly(
    client: AsyncClient, stream: AsyncStream, pace: Pace
) -> AsyncGenerator[Event | None]:
    """The events of a kept stream at a pace; None where another server has gone on with it.

    While its reader lags, nobody reads the stream: buffers on the way would hold all of it, but
    the server parks what nobody reads.
    """
    accepted: Accepted | None = None
    tokens = characters = 0
    told_at, is_back = time.monotonic(), False
    try:
        while True:
            resumed, waited, lags = 0, 0.0, False
            async for event in stream:
                # Who did not read while a server died meets the next one as if it were the first.
                missed = is_back and pace.lost_at > told_at and not isinstance(event, Accepted)
                if stream.resumed > resumed or missed:
                    resumed, told_at = stream.resumed, time.monotonic()
                    yield None
                is_back = is_back and isinstance(event, Accepted)
                if isinstance(event, Accepted):
                    if accepted is None:
                        accepted = event
                        yield event
                    continue
                if not isinstance(event, Tokens):
                    yield event
                    continue
                tokens, characters = tokens + len(event.ids), characters + len(event.text)
                waited += pace.seconds(len(event.ids))
                if lags := waited > _LAG_SECONDS:
                    stream.detach()
                for part in pace.parts(event):
                    await pace.turn()
                    yield part
                if lags:
                    break
            if not lags or accepted is None:
                return
            is_back = True
            reached = [Cursor(0, tokens, characters)]
            stream = client.resume(accepted.stream_id, reached, resume_for=RESUME_SECONDS)
    finally:
        # Before its name was told, nobody could come back for it.
        if accepted is None:
            stream.cancel()
        else:
            stream.detach()
