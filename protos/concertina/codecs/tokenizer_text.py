"""The bytes of every token, from what `tokenizer.json` says of its decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from concertina.codecs.token_text import TokenText
from concertina.codecs.tokenizer_file import LONGEST_TOKEN, TokenizerError, steps_of

_PLAIN: Final = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS: Final = (byte for byte in range(256) if byte not in _PLAIN)
# As GPT-2 writes bytes: each is a character that can be seen.
_BYTE_OF: Final = {chr(byte): byte for byte in _PLAIN} | {
    chr(256 + index): byte for index, byte in enumerate(_OTHERS)
}
_BYTE_TOKEN_LENGTH: Final = len("<0x00>")
_SPACE: Final = "\u2581"
_LONGEST_REPLACEMENT: Final = 64


def token_text(
    spec: dict[str, Any], size: int, content_of: Callable[[int], str | None]
) -> TokenText:
    """The text of `size` tokens, equal to that of `Tokenizer.decode` without special tokens.

    content_of: `Tokenizer.id_to_token`: tokens that are added can be written in another way than in
    the file, since they go through the normalizer.

    One difference: of byte tokens in a row that make no UTF-8, the library also marks those that
    are whole characters; they are known too early for that. Raises TokenizerError.
    """
    contents, special = _contents(spec, size), _special(spec)
    for _, token in _added(spec):
        contents[token] = content_of(token) or contents[token]
    names = {token: content for token, content in contents.items() if content in special}
    steps = [*steps_of(spec.get("decoder"), "decoders")]
    kinds = [str(step.get("type")) for step in steps]
    if kinds == ["ByteLevel"]:
        return TokenText(_pieces(contents, names, size, _of_characters), names=names)
    replaced = [_replacement(step) for step in steps if step["type"] == "Replace"]
    order = ["Replace"] * len(replaced)
    order += [kind for kind in ("ByteFallback", "Fuse", "Strip", "Metaspace") if kind in kinds]
    whole = "Fuse" in kinds or "Strip" not in kinds
    if not steps or kinds != order or not whole or {"Fuse", "Metaspace"} <= {*kinds}:
        named = ", ".join(kinds)[:100] or "none"
        raise TokenizerError(
            f"has the decoder {named}; supported are ByteLevel, Metaspace, and Replace with "
            "ByteFallback, Fuse and Strip"
        )

    def piece(content: str) -> bytes:
        if "ByteFallback" in kinds and (byte := _byte_token(content)) is not None:
            return bytes((byte,))
        for old, new in replaced:
            content = _checked(content.replace(old, new))
        if "Metaspace" in kinds:
            content = content.replace(_mark(steps[-1]), " ")
        return content.encode()

    opening: dict[int, bytes] = {}
    if "Metaspace" in kinds and steps[-1].get("prepend_scheme", "always") != "never":
        mark = _mark(steps[-1])
        opening = {
            token: content.replace(mark, "").encode()
            for token, content in contents.items()
            if mark in content and token not in names
        }
    return TokenText(
        _pieces(contents, names, size, piece),
        opening,
        strip=_strip(steps),
        marks_each_byte="ByteFallback" in kinds,
        names=names,
    )


def _contents(spec: dict[str, Any], size: int) -> dict[int, str]:
    """What the file says of each token; those that are added come last, since they count."""
    contents: dict[int, str] = {}
    for content, token in (*_of_the_model(spec["model"].get("vocab")), *_added(spec)):
        if not isinstance(content, str) or type(token) is not int or not 0 <= token < size:
            raise TokenizerError(
                f"has the token {str(content)[:40]!r} with id {str(token)[:40]}; ids must be below "
                f"the model's {size}"
            )
        contents[token] = _checked(content)
    return contents


def _checked(content: str) -> str:
    if len(content) > LONGEST_TOKEN:
        raise TokenizerError(
            f"has a token of {len(content):,} characters, {content[:40]!r}…; the limit is "
            f"{LONGEST_TOKEN:,}"
        )
    return content


def _of_the_model(vocabulary: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(vocabulary, dict):
        return vocabulary.items()
    if isinstance(vocabulary, list) and all(isinstance(each, list) and each for each in vocabulary):
        return ((each[0], token) for token, each in enumerate(vocabulary))
    raise TokenizerError("has a model without a vocabulary")


def _added(spec: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    added = spec.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(each, dict) for each in added):
        raise TokenizerError("has added_tokens that are no list of tokens")
    return ((each.get("content"), each.get("id")) for each in added)


def _special(spec: dict[str, Any]) -> frozenset[str]:
    added = spec.get("added_tokens") or []
    return frozenset(str(each.get("content")) for each in added if each.get("special"))


def _pieces(
    contents: dict[int, str], names: Mapping[int, str], size: int, piece: Callable[[str], bytes]
) -> tuple[bytes, ...]:
    pieces = [b""] * size
    for token, content in contents.items():
        if token not in names:
            pieces[token] = piece(content)
    return tuple(pieces)


def _of_characters(content: str) -> bytes:
    """The bytes of a token that is written as GPT-2 does; one that is not is plain text."""
    try:
        return bytes([_BYTE_OF[character] for character in content])
    except KeyError:
        return content.encode()


def _byte_token(content: str) -> int | None:
    if len(content) != _BYTE_TOKEN_LENGTH or not content.startswith("<0x") or content[5] != ">":
        return None
    try:
        return int(content[3:5], 16)
    except ValueError:
        return None


def _replacement(step: dict[str, Any]) -> tuple[str, str]:
    pattern = step.get("pattern")
    old = pattern.get("String") if isinstance(pattern, dict) else None
    new = step.get("content")
    if not (isinstance(old, str) and old and isinstance(new, str)):
        raise TokenizerError("has a decoder that replaces something else than a string")
    if len(new) > _LONGEST_REPLACEMENT:
        raise TokenizerError(
            f"has a decoder that puts {len(new):,} characters in place of a string; the limit is "
            f"{_LONGEST_REPLACEMENT}"
        )
    return old, new


def _mark(step: dict[str, Any]) -> str:
    """What a Metaspace writes for a space."""
    return str(step.get("replacement", _SPACE))


def _strip(steps: list[dict[str, Any]]) -> int:
    """Spaces that a text loses at its beginning. Raises TokenizerError if it may lose others."""
    for step in steps:
        if step["type"] == "Strip":
            start = step.get("start")
            if step.get("content") != " " or step.get("stop") or type(start) is not int:
                raise TokenizerError("has a decoder that strips something else than first spaces")
            return start
    return 0
