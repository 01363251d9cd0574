"""How fast a reader wants its tokens: who takes them slowly fills the buffers of its stream."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Final

from concertina.client import Tokens

_MOST_PACES: Final = 4096


@dataclass(eq=False)
class Pace:
    """The pace of one reader. per_second: None lets tokens go as they come, 0 holds them."""

    per_second: float | None = None
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
                self._due = max(self._due + 1 / rate, now)
                return
            self._changed.clear()
            try:
                async with asyncio.timeout(self._due - now if rate > 0 else None):
                    await self._changed.wait()
            except TimeoutError:
                continue

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

    _paces: dict[str, Pace] = field(default_factory=dict)

    def of(self, stream_id: str) -> Pace:
        """The pace of a stream."""
        while len(self._paces) >= _MOST_PACES:
            del self._paces[next(iter(self._paces))]
        return self._paces.setdefault(stream_id, Pace())

    def drop(self, stream_id: str, pace: Pace) -> None:
        """Forget a pace, unless another reader has come to the stream since."""
        if self._paces.get(stream_id) is pace:
            del self._paces[stream_id]
