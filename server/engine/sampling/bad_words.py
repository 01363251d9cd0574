"""Bad words of a stream whose tokens are pieces of text: a word may begin and end inside tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from concertina.codecs.token_text import TokenText
from server.arrays import Ints


class BadWords:
    """The words that an output must not contain, and the end of the output so far."""

    def __init__(self, words: Sequence[bytes], text: TokenText) -> None:
        self._words = tuple(words)
        self._text = text
        self._containing = [text.containing(word) for word in self._words]
        self._kept = max(map(len, self._words)) - 1
        self._tail = b""

    def push(self, token: int) -> None:
        """Add a token to the output."""
        tail = self._tail + self._text.pieces[token]
        self._tail = tail[len(tail) - self._kept :] if len(tail) > self._kept else tail

    def forbidden(self) -> Ints:
        """The tokens that would complete a word; some may be listed twice."""
        found = list(self._containing)
        for word in self._words:
            for begun in range(1, min(len(word) - 1, len(self._tail)) + 1):
                if self._tail.endswith(word[:begun]):
                    found.append(self._text.beginning_with(word[begun:]))
        return np.concatenate(found)
