"""Whole streams: their events put together."""

from __future__ import annotations

from dataclasses import dataclass

from concertina.client.errors import StreamCut
from concertina.client.events import Accepted, Event, Finished, FinishReason, Tokens, Usage


@dataclass(frozen=True, slots=True)
class Completion:
    """A stream that has ended.

    texts: what was generated, a text for each output. rgb: the same of an image model, three bytes
    per pixel. finished: how each output ended.
    """

    accepted: Accepted
    texts: tuple[str, ...]
    rgb: tuple[bytes, ...]
    finished: tuple[Finished, ...]

    @property
    def text(self) -> str:
        """The text of the first output."""
        return self.texts[0]

    @property
    def reason(self) -> FinishReason:
        """Why the first output ended."""
        return self.finished[0].reason

    @property
    def usage(self) -> Usage:
        """What the first output took."""
        return self.finished[0].usage


class Collector:
    """Puts the events of a stream together as they are read."""

    def __init__(self) -> None:
        self._accepted: Accepted | None = None
        self._tokens: list[Tokens] = []
        self._finished: dict[int, Finished] = {}

    def take(self, event: Event) -> None:
        """The next event of the stream."""
        match event:
            case Accepted():
                self._accepted = event
            case Tokens():
                self._tokens.append(event)
            case Finished():
                self._finished[event.output] = event

    def text(self) -> str:
        """The text of all tokens, of one output after the other."""
        ordered = sorted(self._tokens, key=lambda tokens: tokens.output)
        return "".join(tokens.text for tokens in ordered)

    def completion(self) -> Completion:
        """The whole stream. Raises StreamCut if it was cancelled before its end."""
        accepted = self._accepted
        outputs = range(accepted.output.n if accepted else 0)
        if accepted is None or any(output not in self._finished for output in outputs):
            name = accepted.stream_id if accepted else ""
            last = max((tokens.sequence for tokens in self._tokens), default=0)
            raise StreamCut(name, last, "CANCELLED", "it was cancelled before its end")
        of = [[each for each in self._tokens if each.output == output] for output in outputs]
        return Completion(
            accepted,
            tuple("".join(each.text for each in tokens) for tokens in of),
            tuple(b"".join(each.rgb for each in tokens) for tokens in of),
            tuple(self._finished[output] for output in outputs),
        )
