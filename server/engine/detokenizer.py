"""Bytes become text as they arrive: whole characters, and nothing a stop string may still eat."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class Detokenizer:
    """Turns the byte tokens of one stream into text, watching for stop strings."""

    def __init__(self, stop: Sequence[str] = (), include_stop: bool = False) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held = ""
        self.matched: str | None = None

    def push(self, token: int, may_stop: bool = True) -> str:
        """Text that `token` completes. Once a stop string is met, `matched` says which.

        A stop string that is complete while it may not stop is text like any other.
        """
        character = self._decoder.decode(bytes((token,)))
        if not self._stop:
            return character
        before = len(self._held)
        self._held += character
        if may_stop and (found := self._completed(before)):
            at, self.matched = min(found)
            end = at + len(self.matched) if self._include_stop else at
            released, self._held = self._held[:end], ""
            return released
        keep = self._possible_stop()
        released = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return released

    def replay(self, content: bytes, matched: str | None = None) -> str:
        """Text that these tokens complete, as `push` would have given it, at the very beginning.

        `matched` is the stop string that they end with, if one was met.
        """
        text = self._decoder.decode(content)
        if matched is not None:
            return text if self._include_stop else text.removesuffix(matched)
        self._held = text
        keep = self._possible_stop()
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What is left when the stream ends; a torn character becomes U+FFFD."""
        released = self._held + self._decoder.decode(b"", final=True)
        self._held = ""
        return released

    def _completed(self, before: int) -> list[tuple[int, str]]:
        """Where stop strings begin that end behind the first `before` characters held."""
        starts = [(self._held.find(s, max(0, before - len(s) + 1)), s) for s in self._stop]
        return [(at, s) for at, s in starts if at >= 0]

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-size:]) for s in self._stop):
                return size
        return 0
