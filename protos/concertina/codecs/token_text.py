"""The text that tokens stand for: the bytes of each, and a decoder that takes them as they come."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

_EACH_BYTE: Final = "concertina.each_byte"
_NOTHING: Final[Mapping[int, bytes]] = MappingProxyType({})


@dataclass(frozen=True)
class TokenText:
    """The bytes of every token of a vocabulary.

    pieces: of each token; empty if it is no text, as an end token or a pixel. opening: those of a
    token that begins a text, where they differ. strip: spaces that a text loses at its beginning.
    marks_each_byte: whether each byte that is no UTF-8 becomes U+FFFD, and not each sequence.
    """

    pieces: Sequence[bytes] = field(repr=False)
    opening: Mapping[int, bytes] = field(default_factory=lambda: _NOTHING, repr=False)
    strip: int = 0
    marks_each_byte: bool = False

    def is_beginning(self, before: Iterable[int]) -> bool:
        """Whether the text of what follows the tokens `before` differs, since it is the first."""
        if not (self.opening or self.strip):
            return False
        return not any(self.pieces[token] for token in before)

    def bytes_of(self, tokens: Iterable[int]) -> bytes:
        """The bytes of tokens that begin no text."""
        return b"".join([self.pieces[token] for token in tokens])

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

    def push(self, token: int) -> str:
        """The text that `token` completes."""
        piece = self._pieces[token]
        if self._is_beginning and piece:
            piece = self._opened(token, piece)
        return self._decode(piece)

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
