"""Turns tokens into text as they arrive, in whole characters, and finds stop strings.

Text that may be the beginning of a stop string is held back.
"""

from __future__ import annotations

from collections.abc import Sequence

from concertina.codecs.token_text import TextDecoder, TokenText


class Detokenizer:
    """Turns the tokens of one stream into text until a stop string is found.

    text: what tokens stand for. is_beginning: whether their text is the first of the stream.
    matched: the stop string that was found; None before.
    """

    def __init__(
        self,
        text: TokenText,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        is_beginning: bool = True,
    ) -> None:
        self._decoder = TextDecoder(text, is_beginning)
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._held = ""
        self._sent = 0  # characters of the held text that were sent before it was held
        self.matched: str | None = None

    def push(self, token: int, may_stop: bool = True) -> str:
        """The text that `token` completes. Sets `matched` when it completes a stop string.

        With `may_stop` false, a complete stop string is plain text.
        """
        text = self._decoder.push(token)
        if not self._stop:
            return text
        before = len(self._held)
        self._held += text
        if may_stop and (found := self._completed(before)):
            at, self.matched = min(found)
            end = at + len(self.matched) if self._include_stop else at
            released, self._held = self._held[:end], ""
            return self._unsent(released)
        return self._unsent(self._release())

    def replay(self, tokens: Sequence[int], is_stopped: bool = False, sent: int = 0) -> str:
        """The text of all `tokens`, as `push` gives it. Call it before the first `push`.

        is_stopped: whether the last one completed a stop string. One token may complete several
        characters, so that text can follow the stop string, which is dropped.
        sent: number of characters that were sent, maybe with other stop strings. Of them, those
        that are held back now are not released again.
        """
        if is_stopped:
            self._held = self._decoded(tokens[:-1])
            before = len(self._held)
            self._held += self._decoded(tokens[-1:])
            found = self._completed(before)
            if found:  # not in a stored stream whose writer disagrees
                at, matched = min(found)
                self._held = self._held[: at + len(matched) if self._include_stop else at]
            return self._held
        self._held = self._decoded(tokens)
        released = self._release()
        self._sent = max(0, sent - len(released))
        return released

    def flush(self) -> str:
        """The rest of the text when the stream ends; an incomplete character becomes U+FFFD."""
        released = self._held + self._decoder.flush()
        self._held = ""
        return self._unsent(released)

    def _decoded(self, tokens: Sequence[int]) -> str:
        return "".join([self._decoder.push(token) for token in tokens])

    def _release(self) -> str:
        """Release the held text, except what may be the beginning of a stop string."""
        end = len(self._held) - self._possible_stop()
        released, self._held = self._held[:end], self._held[end:]
        return released

    def _unsent(self, released: str) -> str:
        """What of the `released` text was not sent before it was held."""
        unsent = released[self._sent :]
        self._sent = max(0, self._sent - len(released))
        return unsent

    def _completed(self, before: int) -> list[tuple[int, str]]:
        """Positions and stop strings that end after `before` characters of the held text."""
        starts = [(self._held.find(s, max(0, before - len(s) + 1)), s) for s in self._stop]
        return [(at, s) for at, s in starts if at >= 0]

    def _possible_stop(self) -> int:
        """Length of the longest suffix of the held text that is a prefix of a stop string."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-size:]) for s in self._stop):
                return size
        return 0
