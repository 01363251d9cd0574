"""Grammars over the tokens of a model: what they allow, and what is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from types import SimpleNamespace

import numpy as np
import pytest

from concertina.codecs.byte_codec import ByteCodec
from concertina.codecs.codec import Codec
from concertina.codecs.starts import LabelStarts, TokenStarts
from concertina.codecs.token_text import TokenText
from concertina.codecs.tokenizer_codec import tokenizer_codec
from server.bundles.grammars import Grammars
from server.errors import InvalidRequest
from server.request import Grammar, Matcher
from tests.tokenizers_made import KINDS, content_of, trained

END = 0
BYTES = ByteCodec(LabelStarts("tiny", 256, ()))


@pytest.fixture
def grammars() -> Grammars:
    """Those of a model of bytes whose end token is the byte 0."""
    return Grammars(BYTES, {END})


def after(grammar: Grammar, text: str | bytes) -> Matcher:
    """Where an output stands after this text."""
    matcher = grammar.beginning.copy()
    matcher.push([*(text.encode() if isinstance(text, str) else text)])
    return matcher


def next_letters(matcher: Matcher) -> str:
    """The bytes that may come next, as text."""
    return bytes(np.flatnonzero(matcher.allowed()[0]).tolist()).decode("latin-1")


@pytest.mark.parametrize(
    ("kind", "texts", "written", "following", "may_end"),
    [
        ("regex", ["(ab|abc)"], "", "a", False),
        ("regex", ["(ab|abc)"], "ab", "c", True),
        ("regex", ["^a/b$"], "a", "/", False),
        ("regex", ["[a-c]+"], "b", "abc", True),
        ("choice", ["yes", "no", "ye"], "", "ny", False),
        ("choice", ["yes", "no", "ye"], "ye", "s", True),
        ("choice", ["a.c", "a|b", "a\n\\", "a/"], "a", "\n./|", False),
        ("json_object", [], "", "{", False),
        ("json_schema", ['{"type":"boolean"}'], "", "ft", False),
        ("json_schema", ['{"const":"a\\"b"}'], '"a', "\\", False),
        ("lark", ['start: "a" x\nx: "b" | x "c"'], "ab", "c", True),
    ],
)
def test_what_may_come_next(
    grammars: Grammars,
    kind: str,
    texts: list[str],
    written: str,
    following: str,
    may_end: bool,
) -> None:
    matcher = after(grammars.compiled(kind, texts), written)
    assert (next_letters(matcher), matcher.allowed()[1]) == (following, may_end)
    assert not matcher.fault


@pytest.mark.parametrize(
    ("kind", "texts", "written"),
    [
        ("regex", ["a+b"], "aab"),
        ("choice", ["yes", "no"], "no"),
        ("json_object", [], '{"a": [1, {"b": null}]}'),
        ("json_schema", ['{"type":"array","maxItems":1,"items":{"enum":["x"]}}'], '["x"]'),
    ],
)
def test_it_is_complete_where_nothing_may_follow(
    grammars: Grammars, kind: str, texts: list[str], written: str
) -> None:
    grammar = grammars.compiled(kind, texts)
    assert not after(grammar, written[:-1]).is_complete
    matcher = after(grammar, written)
    assert matcher.is_complete
    assert next_letters(matcher) == "" and matcher.allowed()[1]


def test_a_token_that_may_not_come_is_a_fault_and_allows_nothing(grammars: Grammars) -> None:
    matcher = after(grammars.compiled("regex", ["ab"]), "ax")
    assert matcher.fault and not matcher.is_complete
    assert next_letters(matcher) == "" and not matcher.allowed()[1]


def test_an_end_token_is_no_text(grammars: Grammars) -> None:
    assert "\0" not in next_letters(after(grammars.compiled("regex", [r"[\x00-\x02]*"]), ""))
    with_text = Grammars(BYTES, ()).compiled("regex", [r"[\x00-\x02]*"])
    assert next_letters(after(with_text, "")) == "\0\1\2"


def test_copies_go_on_by_themselves(grammars: Grammars) -> None:
    grammar = grammars.compiled("regex", ["abc"])
    first = after(grammar, "a")
    second = first.copy()
    second.push([*b"b"])
    assert [next_letters(m) for m in (grammar.beginning, first, second)] == ["a", "b", "c"]


def test_what_fits(grammars: Grammars) -> None:
    beginning = grammars.compiled("regex", ["abc?"]).beginning
    assert all(beginning.fits([*text]) for text in (b"", b"a", b"ab", b"abc"))
    assert not any(beginning.fits([*text]) for text in (b"b", b"abd", b"abcc"))
    assert next_letters(beginning) == "a"


def test_space_between_parts_of_json_is_limited(grammars: Grammars) -> None:
    grammar = grammars.compiled("json_object", [])
    assert " " in next_letters(after(grammar, "{" + 31 * " "))
    assert " " not in next_letters(after(grammar, "{" + 32 * " "))


def test_the_latest_are_compiled_once(grammars: Grammars) -> None:
    first = grammars.compiled("regex", ["a"])
    assert grammars.compiled("regex", ("a",)) is first
    for number in range(16):
        grammars.compiled("regex", [f"b{number}"])
    again = grammars.compiled("regex", ["a"])
    assert again == first and again is not first


INVALID = [
    ("regex", "(a", "unclosed group"),
    ("regex", r"(a)\1", "backreferences"),
    ("regex", "(?=a)b", "look-around"),
    ("regex", "a{0}", "no text"),
    ("regex", "[^\\x00-\\U0010FFFF]", ""),
    ("lark", 'start: "a', "lexer error"),
    ("lark", "start: x\nx: y\ny: x", ""),
    ("lark", "begin: x", ""),
    ("json_schema", "{", "no JSON"),
    ("json_schema", '{"type":"string"}},{"a":{}', "no JSON"),
    ("json_schema", '{"minimum":NaN}', "NaN"),
    ("json_schema", "[1]", "no JSON object"),
    ("json_schema", '{"type":"integer","minimum":5,"maximum":3}', "minimum"),
    ("json_schema", '{"type":"array","uniqueItems":true}', "uniqueItems"),
    ("json_schema", '{"not":{}}', "not"),
    ("json_schema", '{"x-guidance":{"lenient":true},"not":{}}', "not"),
    ("json_schema", '{"type":"string","format":"iri"}', "iri"),
    ("json_schema", '{"$ref":"#"}', ""),
    ("json_schema", '{"$ref":"http://127.0.0.1:9/x.json"}', ""),
    ("json_schema", '{"$ref":"file:///etc/hostname"}', ""),
]


@pytest.mark.parametrize(("kind", "text", "reason"), INVALID)
def test_an_invalid_one_is_refused_with_field_and_reason(
    grammars: Grammars, kind: str, text: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        grammars.compiled(kind, [text])
    assert refused.value.field == f"sampling.grammar.{kind}"
    assert reason in refused.value.message and len(refused.value.message) < 300
    assert "\n" not in refused.value.message


def test_choices_have_a_limit(grammars: Grammars) -> None:
    with pytest.raises(InvalidRequest, match="at least 1 string"):
        grammars.compiled("choice", [])
    with pytest.raises(InvalidRequest, match="65536: name fewer"):
        grammars.compiled("choice", ["a" * 1000] * 66)


def _deep(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


def _many_rules(count: int) -> str:
    rules = (f'r{n}: "a" r{(7 * n + 1) % count}' for n in range(count))
    return "\n".join(("start: " + "|".join(f"r{n}" for n in range(count)), *rules))


HOSTILE = {
    "repeated repetitions": ("regex", "((a{1,100}){1,100}){1,100}"),
    "a huge repetition": ("regex", "a{1,1000000000}"),
    "letters of all languages": ("regex", r"(\w{1,500}\W{1,500}){1,50}"),
    "an exponential automaton": ("regex", ".*a.{200}b.*"),
    "groups in groups": ("regex", "(" * 4000 + "a" + ")" * 4000),
    "rules in rules": ("lark", "start: " + "(" * 30000 + '"a"' + ")" * 30000),
    "an ambiguous rule": ("lark", 'start: s\ns: s s | s s s | "a"'),
    "many rules": ("lark", _many_rules(2000)),
    "three automata at once": ("lark", "start: A\nA: /(.*a.{15})/ & /(.*b.{17})/ & ~/(.*c.{16})/"),
    "schemas in schemas": ("json_schema", _deep(5000)),
    "a long string": ("json_schema", '{"type":"string","minLength":1000000000}'),
    "a long list": ("json_schema", '{"type":"array","minItems":1000000000}'),
    "patterns at once": (
        "json_schema",
        json.dumps(
            {"allOf": [{"type": "string", "pattern": f".*{c}.{{12}}"} for c in "abcdefghi"]}
        ),
    ),
    "alternatives at once": (
        "json_schema",
        json.dumps(
            {"allOf": [{"anyOf": [{"required": [a + b]} for a in "abcdef"]} for b in "abcdefgh"]}
        ),
    ),
    "a large prime": ("json_schema", '{"type":"integer","multipleOf":982451653}'),
    "many properties": (
        "json_schema",
        json.dumps({"type": "object", "properties": {f"p{n}": {} for n in range(2500)}}),
    ),
    "references twice": (
        "json_schema",
        json.dumps(
            {
                "$defs": {
                    "d30": {"type": "integer"},
                    **{f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(30)},
                },
                "$ref": "#/$defs/d0",
            }
        ),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_one_takes_little_time(grammars: Grammars, name: str) -> None:
    """It is refused, or followed in small steps: here the time that the processor needs counts."""
    kind, text = HOSTILE[name]
    grammars.compiled("regex", ["a"])  # what all need once
    began = time.thread_time()
    try:
        matcher = grammars.compiled(kind, [text]).beginning.copy()
    except InvalidRequest as refused:
        assert refused.field == f"sampling.grammar.{kind}"
        return
    finally:
        assert time.thread_time() - began < 5
    numbers = np.random.default_rng(1)
    for _ in range(200):
        began = time.thread_time()
        allowed = np.flatnonzero(matcher.allowed()[0])
        if not len(allowed):
            break
        matcher.push([int(numbers.choice(allowed))])
        assert time.thread_time() - began < 0.5


def _spelling(pieces: Iterable[bytes], **text: object) -> Codec:
    """A codec of these tokens, which reads no text."""
    given = [*pieces]
    made = SimpleNamespace(size=len(given), text=TokenText(given, **text))  # type: ignore[arg-type]
    made.from_text = lambda _: np.zeros(0, np.int64)
    return made  # type: ignore[return-value]


def test_tokens_may_cross_the_parts_of_a_grammar() -> None:
    pieces = [b"", b"a", b"ab", b"b", b"ba", b"bab", b"", b"b"]
    matcher = Grammars(_spelling(pieces), {6}).compiled("regex", ["a+b?"]).beginning
    assert np.flatnonzero(matcher.allowed()[0]).tolist() == [1, 2]
    matcher = matcher.copy()
    matcher.push([1])
    assert np.flatnonzero(matcher.allowed()[0]).tolist() == [1, 2, 3, 7]


def test_text_that_is_the_only_one_possible_can_be_written() -> None:
    pieces = [b"", b"t", b"r", b"u", b"e", b"ue", b"tru"]
    grammar = Grammars(_spelling(pieces), ()).compiled("choice", ["true"])
    matcher, written = grammar.beginning.copy(), b""
    while not matcher.is_complete:
        token = int(np.flatnonzero(matcher.allowed()[0])[0])
        written += pieces[token]
        matcher.push([token])
    assert written == b"true"


@pytest.mark.parametrize("kind", KINDS)
def test_every_tokenizer_writes_what_the_grammar_says(kind: str) -> None:
    codec = tokenizer_codec(TokenStarts("tiny", trained(kind).get_vocab_size()), content_of(kind))
    grammar = Grammars(codec, {2}).compiled("choice", ["a banana", "an apple", "ä pear"])
    pieces, numbers = codec.text.pieces, np.random.default_rng(1)
    seen = set()
    for _ in range(30):
        matcher, written = grammar.beginning.copy(), b""
        while not matcher.is_complete:
            allowed = np.flatnonzero(matcher.allowed()[0])
            token = int(numbers.choice(allowed))
            written += pieces[token]
            matcher.push([token])
            assert not matcher.fault
        seen.add(written.decode())
    assert seen == {"a banana", "an apple", "ä pear"}
