from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from concertina.codecs.token_text import TextDecoder, TokenText

_BYTES = tuple(bytes((token,)) for token in range(256))


def test_a_token_may_be_any_bytes() -> None:
    text = TokenText((b"a\xe2", b"\x82", b"\xac!", b""))
    decoder = TextDecoder(text)
    assert [decoder.push(token) for token in (0, 3, 1, 2)] == ["a", "", "", "€!"]
    assert decoder.flush() == ""
    assert text.decode([0, 1]) == "a\ufffd"
    assert text.bytes_of([0, 3, 2]) == b"a\xe2\xac!"


@example([b"\xe2", b"", b"a"])  # what is torn stays torn
@given(st.lists(st.sampled_from([b"", b"a", b"bc", b"\xe2", b"\x82", b"\xac!", b"\xe2\x82\xac"])))
def test_pieces_become_the_text_of_all_their_bytes(pieces: list[bytes]) -> None:
    decoder = TextDecoder(TokenText(tuple(pieces)))
    text = "".join([decoder.push(token) for token in range(len(pieces))]) + decoder.flush()
    assert text == b"".join(pieces).decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("content", "each", "sequence"),
    [
        (b"\xf0\x9f\x98", "\ufffd\ufffd\ufffd", "\ufffd"),
        (b"\xf0\x9fA\x80", "\ufffd\ufffdA\ufffd", "\ufffdA\ufffd"),
        ("€".encode(), "€", "€"),
    ],
)
def test_bytes_that_are_no_text_are_marked(content: bytes, each: str, sequence: str) -> None:
    assert TokenText(_BYTES, marks_each_byte=True).decode(content) == each
    assert TokenText(_BYTES).decode(content) == sequence


@pytest.mark.parametrize(
    ("tokens", "strip", "expected"),
    [
        ((0, 1), 1, "a a"),
        ((2, 1), 1, " a"),
        ((2, 1), 2, "a"),
        ((3, 0), 1, "a"),  # what is no text does not begin one
        ((1, 0), 1, "b a"),
        ((0, 0), 0, " a a"),
    ],
)
def test_a_text_loses_spaces_at_its_beginning_only(
    tokens: tuple[int, ...], strip: int, expected: str
) -> None:
    text = TokenText((b" a", b"b" if tokens[0] == 1 else b" a", b" ", b""), strip=strip)
    assert text.decode(tokens) == expected
    assert text.decode(tokens, is_beginning=False) == text.bytes_of(tokens).decode()


def test_the_first_token_of_a_text_may_be_another() -> None:
    text = TokenText((b" a b", b" c", b""), opening={0: b"ab"})
    assert text.decode([2, 0, 0, 1]) == "ab a b c"
    assert text.decode([1, 0]) == " c a b"


@pytest.mark.parametrize(
    ("before", "expected"), [((), True), ((1, 1), True), ((1, 0, 1), False), ((0,), False)]
)
def test_a_text_begins_where_no_token_before_was_text(
    before: tuple[int, ...], expected: bool
) -> None:
    assert TokenText((b"a", b""), strip=1).is_beginning(before) is expected
    assert not TokenText((b"a", b"")).is_beginning(before)
