"""The text that tokens stand for: the bytes of each, and a decoder that takes them as they come."""

from __future__ import annotations

import codecs
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
"""Token ids `[n]`."""

_EACH_BYTE: Final = "concertina.each_byte"
_LAST: Final = b"\xff" * 1024  # behind whatever goes on with a word
_NOTHING: Final[Mapping[int, bytes]] = MappingProxyType({})
_NO_NAMES: Final[Mapping[int, str]] = MappingProxyType({})


@dataclass(frozen=True)
class TokenText:
    """The bytes of every token of a vocabulary.

    pieces: of each token; empty if it is no text, as an end token or a pixel. opening: those of a
    token that begins a text, where they differ. strip: spaces that a text loses at its beginning.
    marks_each_byte: whether each byte that is no UTF-8 becomes U+FFFD, and not each sequence.
    names: what special tokens are called, which are no text.
    """

    pieces: Sequence[bytes] = field(repr=False)
    opening: Mapping[int, bytes] = field(default_factory=lambda: _NOTHING, repr=False)
    strip: int = 0
    marks_each_byte: bool = False
    names: Mapping[int, str] = field(default_factory=lambda: _NO_NAMES, repr=False)

    def written(self, token: int) -> str:
        """The token as a string: its text in the middle of a stream, or what it is called."""
        return self.pieces[token].decode(errors="replace") or self.names.get(token, "")

    def is_beginning(self, before: Iterable[int]) -> bool:
        """Whether the text of what follows the tokens `before` differs, since it is the first."""
        if not (self.opening or self.strip):
            return False
        return not any(self.pieces[token] for token in before)

    def bytes_of(self, tokens: Iterable[int], is_beginning: bool = False) -> bytes:
        """The bytes of the text of `tokens`."""
        decoder = TextDecoder(self, is_beginning)
        return b"".join([decoder.piece(token) for token in tokens])

    def containing(self, word: bytes) -> Ids:
        """The tokens whose bytes contain `word`, which is not empty."""
        content, owners = self._joined
        at = np.flatnonzero(content == word[0])
        for offset in range(1, len(word)):
            at = at[at + offset < len(content)]
            at = at[content[at + offset] == word[offset]]
        return np.unique(owners[at[owners[at] == owners[at + len(word) - 1]]])

    def beginning_with(self, word: bytes) -> Ids:
        """The tokens whose bytes begin with `word`."""
        ordered, tokens = self._sorted
        first = bisect_left(ordered, word)
        return tokens[first : bisect_left(ordered, word + _LAST, first)]

    @cached_property
    def altered_first(self) -> Ids:
        """The tokens that stand for another text where they begin one."""
        spaced = range(len(self.pieces)) if self.strip else ()
        altered = {token for token in spaced if self.pieces[token].startswith(b" ")}
        altered |= {t for t, piece in self.opening.items() if piece != self.pieces[t]}
        return np.array(sorted(altered), np.int64)

    @cached_property
    def _joined(self) -> tuple[npt.NDArray[np.uint8], Ids]:
        """The bytes of all tokens, and which token each byte is of."""
        lengths = [len(piece) for piece in self.pieces]
        content = np.frombuffer(b"".join(self.pieces), np.uint8)
        return content, np.repeat(np.arange(len(lengths)), lengths)

    @cached_property
    def _sorted(self) -> tuple[list[bytes], Ids]:
        """The bytes of all tokens in order, and the token of each."""
        tokens = sorted(range(len(self.pieces)), key=self.pieces.__getitem__)
        return [self.pieces[token] for token in tokens], np.array(tokens)

    def decode(self, tokens: Iterable[int], is_beginning: bool = True) -> str:
        """The whole text of `tokens`."""
        decoder = TextDecoder(self, is_beginning)
        return "".join([decoder.push(token) for token in tokens]) + decoder.flush()


class TextDecoder:
    """Turns tokens into text in whole characters; bytes that are no UTF-8 become U+FFFD."""

    def __init__(self, text: TokenText, is_beginning: bool = True) -> None:
        self._pieces = text.pieces
        self._opening = text.opening
        self._strip = text.strip
        self._is_beginning = is_beginning and bool(text.opening or text.strip)
        errors = _EACH_BYTE if text.marks_each_byte else "replace"
        self._decode = codecs.getincrementaldecoder("utf-8")(errors).decode
        self._may_be_torn = False  # whether the decoder may hold a part of a character

    def push(self, token: int) -> str:
        """The text that `token` completes."""
        piece = self.piece(token)
        if piece.isascii() and not self._may_be_torn:
            return piece.decode("ascii")  # the same, in a fifth of the time
        if piece:  # nothing completes nothing
            self._may_be_torn = not piece.isascii()
        return self._decode(piece)

    def piece(self, token: int) -> bytes:
        """The bytes that `token` adds. Only `push` turns them into text."""
        piece = self._pieces[token]
        if self._is_beginning and piece:
            return self._opened(token, piece)
        return piece

    def flush(self) -> str:
        """The rest of the text at its end: what is left of a character becomes U+FFFD."""
        return self._decode(b"", True)

    def _opened(self, token: int, piece: bytes) -> bytes:
        piece = self._opening.get(token, piece)
        spaces = min(len(piece) - len(piece.lstrip(b" ")), self._strip)
        self._strip -= spaces
        self._is_beginning = self._strip > 0 and spaces == len(piece)
        return piece[spaces:]


def _mark_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _mark_each_byte)
