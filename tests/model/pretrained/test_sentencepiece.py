"""SentencePiece vocabularies of GGUF files: the same tokens as SentencePiece and llama.cpp make.

`gguf_tokenizers.json` has a vocabulary that sentencepiece 0.2.3 trained on our documents, another
of bytes, and what llama.cpp (llama-cpp-python 0.3.36) makes of texts with each. SentencePiece makes
the same, but for the space that llama.cpp and transformers put behind a token that was added.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from concertina.codecs.starts import TokenStarts
from concertina.codecs.tokenizer_codec import TokenizerCodec, tokenizer_codec
from model.pretrained.gguf_vocabulary import vocabulary_of
from model.pretrained.sentencepiece import merged
from model.pretrained.source import PretrainedError

_GIVEN = json.loads((Path(__file__).parent / "gguf_tokenizers.json").read_text())
_KINDS = sorted({*_GIVEN["ids"]} - {"llama"})


def fields(kind: str = "llama", **changes: Any) -> dict[str, Any]:
    """The fields of a GGUF file with one of the vocabularies; None leaves one out."""
    model = "llama" if kind == "llama" else "gpt2"
    made = {"model": model, "pre": kind, "bos_token_id": 1, **_GIVEN[model]}
    if kind == "llama":
        made |= {"pre": "default", "scores": [float(score) for score in made["scores"]]}
    made |= changes
    return {f"tokenizer.ggml.{name}": value for name, value in made.items() if value is not None}


def codec(made: Mapping[str, Any]) -> TokenizerCodec:
    """The codec of a bundle that was converted from these fields."""
    size = len(made["tokenizer.ggml.tokens"])
    return tokenizer_codec(TokenStarts("tiny", size), vocabulary_of(made).files["tokenizer.json"])


@cache
def _codec(kind: str) -> TokenizerCodec:
    return codec(fields(kind))


@pytest.mark.parametrize("kind", ["llama", *_KINDS])
def test_texts_become_the_tokens_of_llama_cpp(kind: str) -> None:
    assert len(_GIVEN["texts"]) == len(_GIVEN["ids"][kind]) >= 100
    for text, expected in zip(_GIVEN["texts"], _GIVEN["ids"][kind], strict=True):
        assert _codec(kind).from_text(text).tolist() == expected, text


def test_kinds_differ_in_what_is_compared() -> None:
    told = [json.dumps(_GIVEN["ids"][kind]) for kind in _KINDS]
    assert len({*told}) == len(_KINDS) == 5


def slowly(text: str, scores: Mapping[str, float]) -> list[str]:
    """The rule, as it is written: join the best pair, the leftmost of equals, until there is none.

    It looks at all pairs again each time.
    """
    pieces = [*text]
    while True:
        pairs = [
            (-scores[pieces[at] + pieces[at + 1]], at)
            for at in range(len(pieces) - 1)
            if pieces[at] + pieces[at + 1] in scores
        ]
        if not pairs:
            return pieces
        _, at = min(pairs)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


def expected_ids(text: str, made: Mapping[str, Any]) -> list[int]:
    """The tokens of a text without tokens that are added, by the rule."""
    tokens, types = made["tokenizer.ggml.tokens"], made["tokenizer.ggml.token_type"]
    scores = {
        token: score
        for token, score, kind in zip(tokens, made["tokenizer.ggml.scores"], types, strict=True)
        if kind == 1
    }
    number = {token: at for at, token in enumerate(tokens)}
    marked = "▁" * bool(text and made.get("tokenizer.ggml.add_space_prefix", True)) + text
    pieces = slowly(marked.replace(" ", "▁"), scores)
    return [
        number[token]
        for piece in pieces
        for token in ([piece] if piece in scores else [f"<0x{b:02X}>" for b in piece.encode()])
    ]


@pytest.mark.parametrize("prefixed", [True, False])
def test_random_texts_become_the_tokens_of_the_rule(prefixed: bool) -> None:
    made = fields(add_space_prefix=prefixed)
    ours, rng = codec(made), random.Random(3)
    letters = [*"  aetoinshr\n.1é世☃", "the ", " of", "   "]
    for number in range(400):
        some = letters if number % 2 else rng.choices(letters, k=3)
        text = "".join(rng.choices(some, k=rng.randrange(60)))
        ids = ours.from_text(text).tolist()
        assert ids == expected_ids(text, made), text
        assert ours.text.decode(ids) == text


def test_runs_of_spaces_with_one_score_are_joined_from_the_left() -> None:
    """As in Llama 2, whose 15 runs of spaces all have the score -1e9."""
    given = _GIVEN["llama"]
    runs = ["▁" * length for length in range(2, 17) if "▁" * length not in given["tokens"]]
    made = fields(
        tokens=given["tokens"] + runs,
        token_type=given["token_type"] + [1] * len(runs),
        scores=[
            -1e9 if token.strip("▁") == "" and len(token) > 1 else float(score)
            for token, score in zip(
                given["tokens"] + runs, given["scores"] + [0] * len(runs), strict=True
            )
        ],
    )
    ours = codec(made)
    for length in range(70):
        text = "a" + " " * length + "the"
        assert ours.from_text(text).tolist() == expected_ids(text, made), length


def test_the_fast_rule_is_the_slow_one_whatever_the_scores() -> None:
    rng = random.Random(4)
    for _ in range(300):
        tokens = {*"ab"} | {"".join(rng.choices("ab", k=rng.randint(2, 5))) for _ in range(9)}
        scores = {token: float(rng.randrange(4)) for token in tokens}
        text = "".join(rng.choices("abc", k=rng.randrange(30)))
        assert merged(text, scores) == slowly(text, scores), (text, scores)


def test_special_tokens_are_found_in_a_text_and_never_made_of_its_letters() -> None:
    ours = _codec("llama")
    assert ours.from_text("<s>hi</s>").tolist()[::3] == [1, 2]
    assert ours.text.decode(ours.from_text("<tool>").tolist()) == "<tool>"
    assert ours.text.pieces[1] == b"" and ours.text.pieces[3] == b"<tool>"
    assert ours.from_text("<0x0A>").tolist() != [_GIVEN["llama"]["tokens"].index("<0x0A>")]


@pytest.mark.parametrize(
    ("changes", "begin"), [({}, 1), ({"add_bos_token": False}, None), ({"bos_token_id": 7}, 7)]
)
def test_a_text_begins_with_a_token_unless_the_file_says_no(
    changes: dict[str, Any], begin: int | None
) -> None:
    assert vocabulary_of(fields(**changes)).begin_token == begin


_TYPES, _SCORES = _GIVEN["llama"]["token_type"], _GIVEN["llama"]["scores"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scores": None}, "tokens without a score"),
        ({"scores": [0.0]}, "tokens without a score"),
        ({"scores": [float("nan")] * len(_SCORES)}, "tokens without a score"),
        ({"scores": ["1"]}, "scores is .*: it has to be a list of float"),
        ({"scores": 1.0}, "scores is 1.0: it has to be a list of float"),
        ({"token_type": _TYPES[1:]}, "without a type"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is set"),
        ({"precompiled_charsmap": [1, 2]}, "precompiled_charsmap is set"),
    ],
)
def test_what_is_not_wholly_known_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(PretrainedError, match=words):
        vocabulary_of(fields(**changes))


def _with(*tokens: tuple[str, float]) -> dict[str, Any]:
    """Only bytes, and these tokens."""
    written = [f"<0x{byte:02X}>" for byte in range(256)]
    return fields(
        tokens=["<unk>", *written, *(token for token, _ in tokens)],
        token_type=[2, *[6] * 256, *[1] * len(tokens)],
        scores=[0.0] * 257 + [score for _, score in tokens],
    )


def test_scores_that_no_order_of_merges_can_say_are_refused() -> None:
    """`ab` and `bc` are equals: of `abc`, the leftmost pair is joined, and so it is of `bcab`."""
    letters = [(letter, 0.0) for letter in "abcd"]
    assert codec(_with(*letters, ("ab", -1.0), ("bc", -2.0))).from_text("abc").tolist() != []
    crossing = [("ab", -1.0), ("bc", -1.0), ("ca", -1.0), ("abc", 5.0), ("bca", 5.0)]
    with pytest.raises(PretrainedError, match="cannot be put into an order of merges"):
        vocabulary_of(_with(*letters, *crossing))


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([("a" * 513, 0.0)], "513 in a token; the limits are 8,388,608 and 512"),
        ([(f"{n:05}" + "a" * 500, 0.0) for n in range(17_000)], "8,585,000 characters"),
    ],
)
def test_tokens_that_would_take_for_ever_are_refused(
    tokens: list[tuple[str, float]], words: str
) -> None:
    with pytest.raises(PretrainedError, match=words):
        vocabulary_of(_with(*tokens))


def test_a_vocabulary_that_lacks_a_byte_is_refused() -> None:
    made = fields()
    tokens = ["gone" if token == "<0x0A>" else token for token in _GIVEN["llama"]["tokens"]]
    with pytest.raises(PretrainedError, match="no token <0x0A>: some bytes have none"):
        vocabulary_of({**made, "tokenizer.ggml.tokens": tokens})


def test_the_library_reads_what_is_written() -> None:
    spec = json.loads(vocabulary_of(fields()).files["tokenizer.json"])
    assert spec["model"]["byte_fallback"] and spec["model"]["type"] == "BPE"
    read = Tokenizer.from_str(json.dumps(spec))
    ids = read.encode("Hello world", add_special_tokens=False).ids
    assert read.decode(ids) == "Hello world"
