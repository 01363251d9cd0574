"""Tokenizers that are broken, unknown, or made to hurt: refused at once, in little memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from concertina.codecs import tokenizer_file
from concertina.codecs.starts import TokenStarts
from concertina.codecs.tokenizer_codec import tokenizer_codec
from concertina.codecs.tokenizer_file import MOST_BYTES, TokenizerError, read_spec
from tests.tokenizers_made import BYTE_LEVEL, SIZE, content_of

ROOT = Path(__file__).parents[3]
_LIMIT_S = 5.0
_SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
# Those of GPT-4, GPT-4o and BLOOM, which real models come with.
_REAL = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t|'re)?|\p{N}{1,3}",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",  # noqa: RUF001
)


@pytest.mark.parametrize("pattern", _REAL)
def test_the_patterns_of_real_tokenizers_pass(pattern: str) -> None:
    split = {**_SPLIT, "pattern": {"Regex": pattern}}
    codec = tokenizer_codec(
        TokenStarts("prose", SIZE + 9), content_of(BYTE_LEVEL, pre_tokenizer=split)
    )
    assert codec.from_text("Hello, world's 123").tolist()


def _replace(pattern: Any, content: str = "x") -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"normalizer": _replace({"Regex": "(a+)+$"})}, "repeats a group"),
        ({"normalizer": _replace({"Regex": r"(?:a|aa)*b"})}, "repeats a group"),
        ({"normalizer": _replace({"Regex": r"([)]x){9}"})}, "repeats a group"),
        ({"pre_tokenizer": {**_SPLIT, "pattern": {"Regex": "(a*)*b"}}}, "repeats a group"),
        ({"normalizer": _replace({"Regex": "a" * 5000})}, "1 to 4096 characters"),
        ({"normalizer": _replace({"String": ""})}, "1 to 4096 characters"),
        ({"normalizer": _replace(7)}, "1 to 4096 characters"),
        ({"normalizer": _replace({"String": "a"}, "b" * 65)}, "64 times as long"),
        (
            {
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": [_replace({"String": "a"}, "aa")] * 7,
                }
            },
            "64 times as long",
        ),
        ({"normalizer": {"type": "Prepend", "prepend": "b" * 65}}, "64 times as long"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{}] * 99}}, "at most 32 steps"),
        ({"normalizer": {"type": "Python"}}, "normalizer of type 'Python'"),
        ({"pre_tokenizer": {"type": "Nothing"}}, "pre_tokenizer of type 'Nothing'"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "model of type 'WordPiece'"),
        ({"model": {"type": "BPE", "end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
        ({"model": 1}, "no model"),
    ],
)
def test_what_is_unknown_or_may_explode_is_refused_by_name(
    changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(TokenizerError, match=named):
        read_spec(content_of(BYTE_LEVEL, **changes))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"normalizer":' * 5000, "is not JSON"),
        (b"[]", "no model"),
        (b"null", "no model"),
        (content_of(BYTE_LEVEL)[:-7], "is not JSON"),
    ],
)
def test_broken_files_are_refused(content: bytes, named: str) -> None:
    with pytest.raises(TokenizerError, match=named):
        read_spec(content)


@pytest.mark.parametrize(
    "model",
    [
        {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "c"]]},
        {"type": "BPE", "vocab": {"a": 0}, "merges": "a"},
        {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 5},
        {"type": "BPE", "vocab": None, "merges": []},
    ],
)
def test_a_model_that_contradicts_itself_is_refused(model: dict[str, Any]) -> None:
    content = content_of(BYTE_LEVEL, model=model, added_tokens=[])
    with pytest.raises(TokenizerError):
        tokenizer_codec(TokenStarts("prose", SIZE), content)


def test_what_the_file_says_of_length_is_not_obeyed() -> None:
    """A padding to 5,000 tokens, which could be four billion, and a truncation to one."""
    padding = {
        "strategy": {"Fixed": 5000}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>",
    }  # fmt: skip
    truncation = {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    content = content_of(BYTE_LEVEL, padding=padding, truncation=truncation)
    codec = tokenizer_codec(TokenStarts("prose", SIZE + 9), content)
    ids = codec.from_text("the quick fox")
    assert len(ids) < 20
    assert codec.text.decode(ids) == "the quick fox"


_HUGE = """
import resource, sys
from concertina.codecs.tokenizer_file import TokenizerError, read_spec
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
pair = b'["a","b"],'
content = b'{"model":{"type":"BPE","vocab":{},"merges":[' + pair * (int(sys.argv[1]) // len(pair))
size = len(content)
try:
    read_spec(content + b'["a","b"]]}}')
except TokenizerError as error:
    print(error)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
took = resource.getrusage(resource.RUSAGE_SELF).ru_utime
sys.exit(grown * 1024 > 3 * size + (64 << 20) or took > 5)
"""


@pytest.mark.parametrize(("size", "named"), [(40 << 20, "items"), (60 << 20, "bytes")])
def test_a_billion_merges_are_refused_before_they_are_parsed(size: int, named: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _HUGE, str(size)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "protos")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    assert f"{named}, the limit is" in ran.stdout


def test_the_largest_files_that_are_read_take_little_time() -> None:
    vocabulary = {f"token {number}": number for number in range(300_000)}
    merges = [["a", "b"]] * 500_000
    content = json.dumps({"model": {"type": "BPE", "vocab": vocabulary, "merges": merges}}).encode()
    assert len(content) < MOST_BYTES
    began = time.process_time()
    assert len(read_spec(content)["model"]["merges"]) == len(merges)
    assert time.process_time() - began < _LIMIT_S
    assert tokenizer_file.MOST_BYTES == 48 << 20
