from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.engine.detokenizer import Detokenizer
from tests.server.engines import BYTES

SAMPLE = "aé€𝄞ñ中👩‍👩‍👧z"


def _pushes(content: bytes, stop: Iterable[str] = ()) -> tuple[list[str], Detokenizer]:
    stream = Detokenizer(BYTES, tuple(stop))
    pieces = []
    for byte in content:
        pieces.append(stream.push(byte))
        if stream.matched is not None:
            break
    return pieces, stream


def test_every_character_arrives_with_its_last_byte() -> None:
    pieces, stream = _pushes(SAMPLE.encode())
    expected = [piece for c in SAMPLE for piece in [""] * (len(c.encode()) - 1) + [c]]
    assert pieces == expected
    assert stream.flush() == ""


@pytest.mark.parametrize("cut", range(len(SAMPLE.encode()) + 1))
def test_an_ending_cuts_at_most_one_character(cut: int) -> None:
    pieces, stream = _pushes(SAMPLE.encode()[:cut])
    whole = SAMPLE.encode()[:cut].decode(errors="ignore")
    assert "".join(pieces) == whole
    is_cut = len(whole.encode()) < cut
    assert stream.flush() == ("\ufffd" if is_cut else "")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a\xffb", ["a", "\ufffd", "b"]),
        (b"\x80\x80", ["\ufffd", "\ufffd"]),
        (b"\xc3A", ["", "\ufffdA"]),
        (b"\xe2\x82A", ["", "", "\ufffdA"]),
        (b"\xc0\xaf", ["\ufffd", "\ufffd"]),  # an overlong slash
        (b"\xed\xa0\x80", ["", "", "\ufffd\ufffd\ufffd"]),  # a surrogate
        (b"\xf0\x9f\xf0\x9f\x98\x80", ["", "", "\ufffd", "", "", "😀"]),
    ],
)
def test_invalid_bytes_become_replacement_characters(content: bytes, expected: list[str]) -> None:
    assert _pushes(content)[0] == expected


@pytest.mark.parametrize(
    ("text", "stop", "expected", "matched"),
    [
        ("one\n\ntwo", ["\n\n"], "one", "\n\n"),
        ("abcabd", ["abd"], "abc", "abd"),
        ("aaab", ["aab"], "a", "aab"),
        ("xabc", ["c", "abc"], "x", "abc"),  # both end here: the earlier beginning counts
        ("xabcd", ["abcd", "b"], "xa", "b"),  # the one that is complete first counts
        ("abab", ["abac"], "abab", None),
        ("a€b", ["€"], "a", "€"),
        ("stop", ["stop"], "", "stop"),
    ],
)
def test_a_stop_string_and_later_text_are_not_sent(
    text: str, stop: list[str], expected: str, matched: str | None
) -> None:
    pieces, stream = _pushes(text.encode(), stop)
    assert stream.matched == matched
    sent = "".join(pieces)
    assert (sent if matched else sent + stream.flush()) == expected


def test_only_a_possible_stop_string_is_held_back() -> None:
    pieces, _ = _pushes(b"a\n\nb\n# x", ["\n\n\n", "\n#!"])
    assert pieces == ["a", "", "", "\n\nb", "", "", "\n# ", "x"]


def test_held_text_is_sent_at_the_end() -> None:
    pieces, stream = _pushes(b"a\n", ["\n\n"])
    assert pieces == ["a", ""]
    assert stream.flush() == "\n"
    assert stream.flush() == ""
    assert stream.matched is None


Letters = st.sampled_from(["a", "b", "é", "€", "😀"])
Content = st.lists(
    st.one_of(Letters.map(str.encode), st.integers(0, 255).map(lambda byte: bytes([byte]))),
    max_size=30,
).map(b"".join)
Stops = st.lists(st.text(Letters, min_size=1, max_size=4), max_size=4)


@given(Content, Stops)
@example(b"aab\xe2\x82ab", ["aab\ufffdab", "\ufffda"])
def test_any_bytes_give_the_text_before_the_first_stop_string(
    content: bytes, stops: list[str]
) -> None:
    pieces, stream = _pushes(content, stops)
    sent = "".join(pieces) if stream.matched is not None else "".join(pieces) + stream.flush()
    expected, matched = _whole(content.decode(errors="replace"), stops)
    assert (sent, stream.matched) == (expected, matched)


@given(st.text(Letters, max_size=30), Stops)
def test_text_is_sent_as_soon_as_no_stop_string_can_begin_with_it(
    text: str, stops: list[str]
) -> None:
    stream = Detokenizer(BYTES, tuple(stops))
    sent = ""
    for end, character in enumerate(text, 1):
        sent += "".join(stream.push(byte) for byte in character.encode())
        if stream.matched is not None:
            return
        held = text[len(sent) : end]
        assert text.startswith(sent)
        assert not held or any(stop.startswith(held) for stop in stops)


def _whole(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The stop string that is complete first; the longest, if several end together."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize(
    ("stop", "pieces", "released"),
    [
        (["bc"], "abcd", ["a", "", "bc"]),
        (["bc", "c"], "abc", ["a", "", "bc"]),
        (["abc", "b"], "ab", ["", "ab"]),
        (["é"], "aé", ["a", "", "é"]),
    ],
)
def test_the_stop_string_can_be_included(stop: list[str], pieces: str, released: list[str]) -> None:
    stream = Detokenizer(BYTES, stop, include_stop=True)
    assert [stream.push(byte) for byte in pieces.encode()[: len(released)]] == released
    assert stream.matched is not None
    assert stream.flush() == ""


@pytest.mark.parametrize(
    ("stop", "text", "free", "expected", "matched"),
    [
        (["ab"], "abab", 0, "", "ab"),
        (["ab"], "abab", 1, "", "ab"),  # begins before it may stop, ends when it may
        (["ab"], "abab", 2, "ab", "ab"),
        (["ab"], "abab", 3, "ab", "ab"),
        (["ab"], "abab", 4, "abab", None),
        (["ab", "abc"], "abx", 2, "abx", None),  # held for the second when the first may count
        (["ab", "abc"], "abc", 2, "", "abc"),
        (["aa"], "aaa", 2, "a", "aa"),
    ],
)
def test_a_stop_string_before_min_tokens_is_text(
    stop: list[str], text: str, free: int, expected: str, matched: str | None
) -> None:
    stream, sent = Detokenizer(BYTES, stop), ""
    for index, byte in enumerate(text.encode()):
        sent += stream.push(byte, may_stop=index >= free)
        if stream.matched is not None:
            break
    assert (sent + stream.flush(), stream.matched) == (expected, matched)


Torn = st.one_of(Letters, st.just("\ufffd"))
Ends = st.lists(st.text(Torn, min_size=1, max_size=4), max_size=3)


def _read(stream: Detokenizer, content: bytes, begin: int = 0, free: int = 0) -> tuple[str, int]:
    """The text that `stream` gives for the bytes from `begin` on, and how many it takes in all."""
    text = ""
    for end in range(begin + 1, len(content) + 1):
        text += stream.push(content[end - 1], may_stop=end > free)
        if stream.matched is not None:
            return text, end
    return text + stream.flush(), len(content)


@given(Content, Ends, st.booleans(), st.integers(0, 12))
@example(b"a\xc3b", ["\ufffd"], False, 0)
@example(b"a\xc3b", ["\ufffd"], True, 0)
@example(b"a\xe2\x82\xc3", ["\ufffd"], False, 0)
def test_text_read_later_is_the_text_that_was_read_live(
    content: bytes, stops: list[str], include_stop: bool, free: int
) -> None:
    """From any byte on: what was sent before, and what a stream sends that goes on from there."""
    live, sent = Detokenizer(BYTES, stops, include_stop), ""
    whole = Detokenizer(BYTES, stops, include_stop)
    expected = _read(whole, content, free=free)
    for end, byte in enumerate(content, 1):
        sent += live.push(byte, may_stop=end > free)
        later = Detokenizer(BYTES, stops, include_stop)
        assert later.replay(content[:end], live.matched is not None) == sent
        if live.matched is not None:
            break
        rest, taken = _read(later, content, end, free)
        assert (sent + rest, taken, later.matched) == (*expected, whole.matched)


@given(Content, st.integers(0, 30), Ends, Ends)
@example(b"xabd", 3, [], ["abc"])
@example(b"xabdefgh", 3, [], ["abc"])
@example(b"xab", 3, [], ["abc"])
@example(b"xabc", 3, [], ["abc"])
@example(b"xab", 3, ["abc"], [])
def test_text_goes_on_where_it_was_when_stop_strings_change(
    content: bytes, cut: int, before: list[str], after: list[str]
) -> None:
    """A stream that is paused and continues with others: nothing is sent twice, or left out."""
    first, sent = Detokenizer(BYTES, before), ""
    for byte in content[:cut]:
        sent += first.push(byte, may_stop=False)
    second = Detokenizer(BYTES, after)
    live = second.replay(content[:cut], sent=len(sent))[len(sent) :]
    rest, taken = _read(second, content, min(cut, len(content)))
    live += rest
    later = Detokenizer(BYTES, after)
    read = later.replay(content[:taken], second.matched is not None)
    if second.matched is None:
        read += later.flush()
        assert sent + live == content.decode(errors="replace")
    assert live == read[len(sent) :]


@pytest.mark.parametrize("content", [b"", b"abc"])
def test_a_stop_string_that_is_not_there_ends_no_text(content: bytes) -> None:
    """A stored stream may say that it was met."""
    assert Detokenizer(BYTES, ["x"]).replay(content, is_stopped=True) == content.decode()
