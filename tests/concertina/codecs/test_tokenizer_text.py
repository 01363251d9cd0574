"""What tokens stand for, beside what the library `tokenizers` makes of the same ids."""

from __future__ import annotations

import json
import os
import random
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from concertina.codecs.starts import TokenStarts
from concertina.codecs.token_text import TextDecoder, TokenText
from concertina.codecs.tokenizer_codec import TokenizerCodec, tokenizer_codec
from concertina.codecs.tokenizer_file import TokenizerError
from concertina.codecs.tokenizer_text import token_text
from tests.tokenizers_made import (
    BYTE_FALLBACK,
    BYTE_LEVEL,
    KINDS,
    TEXTS,
    UNIGRAM,
    content_of,
    trained,
)

_ROOM = 7  # tokens of the model beyond those of the file
_STREAMS, _TOKENS = 300, 40
_BYTE = re.compile("<0x[0-9A-F]{2}>")


def _codec(kind: str) -> TokenizerCodec:
    size = trained(kind).get_vocab_size() + _ROOM
    return tokenizer_codec(TokenStarts("prose", size), content_of(kind))


def _streamed(text: TokenText, ids: list[int], restart: int | None = None) -> str:
    """The text of `ids` as it comes, by a decoder that is made anew at token `restart`."""
    decoder, sent = TextDecoder(text), ""
    for index, token in enumerate(ids):
        if index == restart:
            decoder = TextDecoder(text)
            assert "".join(decoder.push(before) for before in ids[:index]) == sent
        sent += decoder.push(token)
    return sent + decoder.flush()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_text_becomes_the_library_s_tokens_and_the_library_s_text(kind: str, text: str) -> None:
    codec, tokenizer = _codec(kind), trained(kind)
    ids = codec.from_text(text).tolist()
    assert ids == tokenizer.encode(text, add_special_tokens=False).ids
    expected = tokenizer.decode(ids)
    assert [_streamed(codec.text, ids, at) for at in range(len(ids) + 1)] == [expected] * (
        len(ids) + 1
    )


_GIVEN = sorted(Path(os.environ.get("TOKENIZERS") or os.devnull).glob("*.json"))


@pytest.mark.parametrize("name", [*KINDS, *map(str, _GIVEN)])
def test_random_tokens_become_the_library_s_text(name: str) -> None:
    """At every split, and by a decoder that is made anew at every token.

    TOKENIZERS=folder names further files, such as those of models that are not ours to keep here.
    """
    content = content_of(name) if name in KINDS else Path(name).read_bytes()
    tokenizer, rng = Tokenizer.from_buffer(content), random.Random(1)
    known = range(tokenizer.get_vocab_size())
    codec = tokenizer_codec(TokenStarts("prose", len(known) + _ROOM), content)
    bytes_are_rare = [0.01 if _is_byte(codec, token) else 1.0 for token in known]
    compared = 0
    for _ in range(_STREAMS):
        ids = rng.choices(known, bytes_are_rare, k=_TOKENS)
        for cut in range(_TOKENS + 1):
            if not _mixes_characters_and_stray_bytes(codec, ids[:cut]):
                compared += 1
                assert _streamed(codec.text, ids[:cut], cut // 2) == tokenizer.decode(ids[:cut])
        whole = _streamed(codec.text, ids)
        assert all(_streamed(codec.text, ids, at) == whole for at in range(_TOKENS + 1))
    assert compared > _STREAMS * _TOKENS // 3


def _is_byte(codec: TokenizerCodec, token: int) -> bool:
    return _BYTE.fullmatch(codec.tokenizer.id_to_token(token) or "") is not None


def _mixes_characters_and_stray_bytes(codec: TokenizerCodec, ids: list[int]) -> bool:
    """Whether byte tokens in a row are partly UTF-8: the library then marks all of them."""
    tokens = [codec.tokenizer.id_to_token(token) or "" for token in ids]
    if not any(map(_BYTE.fullmatch, tokens)):
        return False
    special = {t.content for t in codec.tokenizer.get_added_tokens_decoder().values() if t.special}
    shown = [token for token in tokens if token not in special]
    for is_byte, run in groupby(shown, lambda token: bool(_BYTE.fullmatch(token))):
        content = bytes(int(token[3:5], 16) for token in run) if is_byte else b""
        marked = content.decode(errors="replace")
        if "\ufffd" in marked and marked.strip("\ufffd"):
            return True
    return False


@pytest.mark.parametrize("kind", [BYTE_FALLBACK, UNIGRAM])
def test_stray_byte_tokens_are_marked_one_by_one(kind: str) -> None:
    codec, tokenizer = _codec(kind), trained(kind)
    byte = [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    for content in (b"\x80\x80", b"\xf0\x9f\x98", "😀€".encode(), b"\n"):
        ids = [byte[each] for each in content]
        assert _streamed(codec.text, ids) == tokenizer.decode(ids)
    ids = [byte[each] for each in b"A\x80"]  # known when it comes, and sent
    assert (_streamed(codec.text, ids), tokenizer.decode(ids)) == ("A\ufffd", "\ufffd\ufffd")


def test_only_the_first_word_of_a_text_loses_its_space() -> None:
    codec = _codec(BYTE_FALLBACK)
    ids = codec.from_text("Hello world").tolist()
    assert codec.text.decode(ids) == "Hello world"
    assert codec.text.decode(ids, is_beginning=False) == " Hello world"
    start = [trained(BYTE_FALLBACK).token_to_id("<s>")]
    assert codec.text.is_beginning(start) and not codec.text.is_beginning([*start, *ids])


def test_tokens_beyond_the_file_are_no_text() -> None:
    codec = _codec(BYTE_LEVEL)
    assert codec.text.pieces[-_ROOM:] == (b"",) * _ROOM
    assert codec.text.decode([codec.size - 1]) == ""


def _decoded_by(decoder: Any, **changes: Any) -> TokenText:
    spec = json.loads(content_of(BYTE_FALLBACK, decoder=decoder))
    return token_text(spec | changes, len(spec["model"]["vocab"]) + 9, lambda token: None)


_REPLACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


@pytest.mark.parametrize(
    ("decoder", "named"),
    [
        (None, "decoder none"),
        ({"type": "WordPiece", "prefix": "##", "cleanup": True}, "decoder WordPiece"),
        ({"type": "BPEDecoder", "suffix": "</w>"}, "decoder BPEDecoder"),
        ({"type": "CTC"}, "decoder CTC"),
        ({"type": "Sequence", "decoders": [_REPLACE, _STRIP]}, "decoder Replace, Strip"),
        (
            {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Metaspace"}]},
            "decoder Fuse, Metaspace",
        ),
        (
            {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, _REPLACE]},
            "decoder ByteFallback, Replace",
        ),
        (
            {"type": "Sequence", "decoders": [{"type": "Fuse"}, {**_STRIP, "stop": 1}]},
            "strips something else than first spaces",
        ),
        ({**_REPLACE, "pattern": {"Regex": "▁+"}}, "replaces something else than a string"),
        ({"type": "Sequence", "decoders": 3}, "no list of at most 32 steps"),
    ],
)
def test_a_decoder_that_is_not_known_is_refused_by_name(decoder: Any, named: str) -> None:
    with pytest.raises(TokenizerError, match=re.escape(named)):
        _decoded_by(decoder)


@pytest.mark.parametrize(
    "changes",
    [
        {"added_tokens": [{"content": "<x>", "id": 1 << 40, "special": True}]},
        {"added_tokens": [{"content": "<x>", "id": -1}]},
        {"added_tokens": [{"content": "<x>", "id": True}]},
        {"model": {"vocab": {"a": 4_000_000_000}}},
    ],
)
def test_ids_beyond_the_model_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError, match="ids must be below the model's"):
        _decoded_by(_REPLACE, **changes)
