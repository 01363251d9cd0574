"""Compiles grammars over the tokens of a model, with llguidance, and follows outputs through them.

What a caller sends is compiled within limits that the library counts in steps of its own, not in
seconds, so that a grammar is refused everywhere or nowhere. No schema is fetched from anywhere.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Final

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from concertina.codecs.codec import Codec
from concertina.codecs.prompt_error import PromptError
from server.arrays import Bools
from server.errors import InvalidRequest
from server.request import Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# Of the time and memory that one grammar takes. A step within them takes a few milliseconds at
# most, a state of the lexer up to 2 KiB.
_LIMITS: Final = LLParserLimits(
    max_items_in_row=1000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_lexer_states=10_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)
# Without a bound, a model may write nothing but spaces until its tokens are used up.
_SPACE: Final = r"[ \t\n\r]{0,32}"
# What cannot be enforced is refused, whatever the schema itself says of that.
_JSON: Final[JsonCompileOptions] = {
    "whitespace_pattern": _SPACE,
    "lenient": False,
    "coerce_one_of": False,
}
_OBJECT: Final = '{"type":"object"}'
GRAMMAR_KINDS: Final = frozenset({"json_schema", "json_object", "regex", "choice", "lark"})
"""The fields of the message Grammar."""

_MOST_KEPT: Final = 16
_READ: Final = 128  # bytes
_LONGEST_REASON: Final = 200
_MOST_CHOICE_BYTES: Final = 65536


class Grammars:
    """The grammars of one model. The latest are kept, so that most requests compile nothing."""

    def __init__(self, codec: Codec, end_tokens: Collection[int]) -> None:
        self._codec = codec
        self._end_tokens = frozenset(end_tokens)
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, tuple[str, ...]], Grammar] = OrderedDict()

    def compiled(self, kind: str, texts: Sequence[str]) -> Grammar:
        """The grammar of a `kind` (see the message Grammar), ready to be followed.

        May take half a second. Raises InvalidRequest with field and reason.
        """
        key = kind, tuple(texts)
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                found = Grammar(*key, beginning=self._compile(*key))
                self._kept[key] = found
                if len(self._kept) > _MOST_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
        return found

    def _compile(self, kind: str, texts: tuple[str, ...]) -> TokenMatcher:
        try:
            started = LLMatcher(self._tokenizer, _source(kind, texts), log_level=0, limits=_LIMITS)
            matcher = TokenMatcher(started, self._codec.size)
            allowed, _ = matcher.allowed()
        except BaseException as error:  # a panic of the library is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise _invalid(kind, "it is too large, or nested too deeply") from None
        if fault := matcher.fault:
            raise _invalid(kind, fault)
        if not allowed.any():
            raise _invalid(kind, "it leaves no text to write")
        return matcher

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return LLTokenizer(TokenizerWrapper(_Vocabulary(self._codec, self._end_tokens)))


class TokenMatcher:
    """See Matcher. size: number of tokens of the model."""

    def __init__(self, matcher: LLMatcher, size: int) -> None:
        self._matcher = matcher
        self._size = size
        self._bits = np.zeros(size // 32 + 1, np.int32)  # and one for the end
        self._address = self._bits.ctypes.data

    def copy(self) -> TokenMatcher:
        return TokenMatcher(self._matcher.deep_copy(), self._size)

    def allowed(self) -> tuple[Bools, bool]:
        self._matcher.unsafe_compute_mask_ptr(self._address, self._bits.nbytes)
        if self._matcher.is_error():
            return np.zeros(self._size, np.bool_), False
        bits = self._bits.view(np.uint8)
        flags = np.unpackbits(bits, count=self._size + 1, bitorder="little").view(np.bool_)
        return flags[:-1], bool(flags[-1])

    def push(self, tokens: Sequence[int]) -> None:
        self._matcher.consume_tokens([*tokens])

    def fits(self, tokens: Sequence[int]) -> bool:
        return self._matcher.validate_tokens([*tokens]) == len(tokens)

    @property
    def is_complete(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def fault(self) -> str:
        return self._matcher.get_error() if self._matcher.is_error() else ""


class _Vocabulary:
    """The tokens of a model as llguidance asks for them, and one after them that stands for an end.

    End tokens of the model are no text here: whether they may be drawn depends on the request.
    """

    bos_token_id = None

    def __init__(self, codec: Codec, end_tokens: Collection[int]) -> None:
        self._codec = codec
        pieces = [b"" if t in end_tokens else p for t, p in enumerate(codec.text.pieces)]
        self.eos_token_id = codec.size
        self.tokens = [*pieces, b""]
        self.special_token_ids = [codec.size]
        self._ids = {piece: token for token, piece in reversed([*enumerate(pieces)]) if piece}
        self._longest = max(map(len, self._ids), default=0)
        letters = (self._ids.get(bytes((byte,)), -1) for byte in range(256))
        self._letters = np.fromiter(letters, np.int64, 256)

    def __call__(self, content: bytes) -> list[int]:
        """The tokens of text that is the only one possible, as the model would read them.

        The library asks at every step for all such text, and uses the next tokens of it only, so
        that what is far away is spelt byte by byte: that is fast.
        """
        ahead = self._letters[np.frombuffer(content[_READ:], np.uint8)]
        if ahead.min(initial=0) < 0:
            return self._longest_first(content)
        return [*self._read(content[:_READ]), *ahead.tolist()]

    def _read(self, content: bytes) -> list[int]:
        if self._longest > 1:
            try:
                tokens: list[int] = self._codec.from_text(content.decode()).tolist()
            except (UnicodeDecodeError, PromptError):
                return self._longest_first(content)
            if b"".join([self.tokens[token] for token in tokens]) == content:
                return tokens
        return self._longest_first(content)

    def _longest_first(self, content: bytes) -> list[int]:
        tokens, at = [], 0
        while at < len(content):
            ends = range(min(len(content), at + self._longest), at, -1)
            end = next((end for end in ends if content[at:end] in self._ids), None)
            if end is None:
                break  # no token spells it, so that the output cannot go on
            tokens.append(self._ids[content[at:end]])
            at = end
        return tokens


def _source(kind: str, texts: tuple[str, ...]) -> str:
    """The grammar as llguidance reads it. Raises InvalidRequest."""
    match kind:
        case "json_object":
            return LLMatcher.grammar_from_json_schema(_OBJECT, overrides=_JSON)
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(_schema(*texts), overrides=_JSON)
        case "regex":
            return LLMatcher.grammar_from_regex(*texts)
        case "choice":
            return LLMatcher.grammar_from_regex("|".join(map(re.escape, _choices(texts))))
        case "lark":
            return LLMatcher.grammar_from_lark(*texts)
    raise AssertionError(f"unknown kind of grammar: {kind}")


def _schema(text: str) -> str:
    """A JSON Schema as JSON, and as nothing else that the library would take out of it."""
    try:
        schema = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise _invalid("json_schema", f"it is no JSON: {reason}") from None
    if not isinstance(schema, dict):
        raise _invalid("json_schema", "it is no JSON object")
    return json.dumps(schema)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _choices(texts: tuple[str, ...]) -> tuple[str, ...]:
    if not texts:
        raise InvalidRequest(
            "sampling.grammar.choice.texts is empty: it must hold at least 1 string",
            field="sampling.grammar.choice.texts",
            limit=1,
        )
    size = sum(len(text.encode()) for text in texts)
    if size > _MOST_CHOICE_BYTES:
        raise InvalidRequest(
            f"sampling.grammar.choice.texts has {size} bytes together; the limit is "
            f"{_MOST_CHOICE_BYTES}: name fewer, or shorten them",
            field="sampling.grammar.choice.texts",
            limit=_MOST_CHOICE_BYTES,
        )
    return texts


def _invalid(kind: str, reason: str) -> InvalidRequest:
    first = " ".join(reason.replace("<non-verbose/>", "").split())[:_LONGEST_REASON]
    field = f"sampling.grammar.{kind}"
    return InvalidRequest(f"{field} cannot be used: {first or 'it is invalid'}", field=field)
