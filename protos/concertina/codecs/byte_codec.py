"""The codec of models whose tokens are the bytes of UTF-8."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from concertina.codecs.prompt_error import PromptError
from concertina.codecs.starts import LabelStarts
from concertina.codecs.token_text import Ids, TokenText

MOST_BYTES = 256
"""Most tokens that are bytes."""


@dataclass(frozen=True)
class ByteCodec:
    """See Codec. Each token is one byte of UTF-8."""

    starts: LabelStarts

    takes = frozenset({"text"})
    makes = "text"
    writes_text = True
    is_bytewise = True
    complete_at = None

    @property
    def size(self) -> int:
        return self.starts.vocabulary

    @cached_property
    def text(self) -> TokenText:
        return TokenText(tuple(bytes((token,)) for token in range(self.size)))

    def from_text(self, text: str) -> Ids:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int64)

    def from_png(self, png: bytes) -> Ids:
        raise no_image(self.starts.model)

    def from_rgb(self, rgb: bytes) -> Ids:
        raise no_image(self.starts.model)

    def rgb(self, tokens: Iterable[int]) -> bytes:
        return b""


def no_image(model: str) -> PromptError:
    """What a model of text says of a picture."""
    return PromptError("image", f"was given, but {model} makes text: give text")
