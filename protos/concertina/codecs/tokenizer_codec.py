"""The codec of models whose tokens are pieces of text, with the library `tokenizers`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from concertina.codecs.byte_codec import no_image
from concertina.codecs.prompt_error import PromptError
from concertina.codecs.starts import TokenStarts
from concertina.codecs.token_text import Ids, TokenText
from concertina.codecs.tokenizer_file import TokenizerError, read_spec
from concertina.codecs.tokenizer_text import token_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class TokenizerCodec:
    """See Codec. tokenizer: turns text into tokens; the other way, `text` does."""

    starts: TokenStarts
    text: TokenText
    tokenizer: Tokenizer = field(repr=False)

    takes = frozenset({"text"})
    makes = "text"
    writes_text = True
    is_bytewise = False
    complete_at = None

    @property
    def size(self) -> int:
        return self.starts.vocabulary

    def from_text(self, text: str) -> Ids:
        try:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        except BaseException as error:  # the library panics where a pattern takes too long
            if not _is_of_the_library(error):
                raise
            raise PromptError("text", "is nothing that the tokenizer can take apart") from None
        return np.array(ids, np.int64)

    def from_png(self, png: bytes) -> Ids:
        raise no_image(self.starts.model)

    def from_rgb(self, rgb: bytes) -> Ids:
        raise no_image(self.starts.model)

    def rgb(self, tokens: Iterable[int]) -> bytes:
        return b""


def tokenizer_codec(starts: TokenStarts, content: bytes) -> TokenizerCodec:
    """The codec of a `tokenizer.json` with this `content`. Raises TokenizerError.

    The vocabulary of the model may have more tokens than the file: those are no text.
    """
    spec = read_spec(content)
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise TokenizerError(
            "needs the library tokenizers: pip install 'concertina-client[codecs]'"
        ) from None
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except BaseException as error:
        if not _is_of_the_library(error):
            raise
        raise TokenizerError(f"is no tokenizer: {str(error)[:100]}") from None
    text = token_text(spec, starts.vocabulary, tokenizer.id_to_token)
    tokenizer.no_truncation()  # the file may ask for both
    tokenizer.no_padding()
    return TokenizerCodec(starts, text, tokenizer)


def _is_of_the_library(error: BaseException) -> bool:
    """Whether the library refuses its input: by an error, or by a panic, which is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
