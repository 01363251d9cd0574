"""The vocabulary in a GGUF file, as a `tokenizer.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

from concertina.codecs.chat_template import TEMPLATE
from concertina.codecs.tokenizer_file import TOKENIZER
from concertina.shown import shown
from model.pretrained.sentencepiece import bpe_of, check, steps
from model.pretrained.source import PretrainedError, Vocabulary

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_SPECIAL: Final = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "separator",
    "pad_token": "padding",
}
_CASES: Final = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS: Final = (
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> tuple[dict[str, Any], ...]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return (step,)


_SPLITS: Final[dict[str, tuple[dict[str, Any], ...]]] = {
    "gpt-2": (),
    "smollm": ({"type": "Digits", "individual_digits": True},),
    "llama-bpe": _split(_CASES + _WORDS % "{1,3}"),
    "qwen2": _split(_CASES + _WORDS % ""),
    "tekken": _split(_TEKKEN),
}
"""What cuts a text before its bytes are merged, by llama.cpp's name for it."""
_WHOLE_WORDS: Final = ("llama-bpe", "tekken")
"""Kinds whose words are tokens even if no merges lead there, and whose texts begin with a token."""
_REMEDY: Final = "convert the model's Hugging Face folder"


def vocabulary_of(fields: Mapping[str, Any]) -> Vocabulary:
    """What the fields of a GGUF file say. Raises PretrainedError.

    Byte-level BPE of known kinds and SentencePiece's BPE have all that they need in the file;
    nothing is guessed of others.
    """
    if "tokenizer.ggml.model" not in fields or not (tokens := _list_of(fields, "tokens", str)):
        return Vocabulary()
    named = dict(_named(fields, tokens))
    files = {TOKENIZER: json.dumps(_spec(fields, tokens), ensure_ascii=False).encode()}
    template = fields.get("tokenizer.chat_template")
    if isinstance(template, str):
        files[TEMPLATE] = template.encode()
    begins = fields["tokenizer.ggml.model"] == "llama" or _kind(fields) in _WHOLE_WORDS
    adds = fields.get("tokenizer.ggml.add_bos_token", begins)
    begin = fields.get("tokenizer.ggml.bos_token_id") if adds else None
    return Vocabulary(files, named, begin)


def _named(fields: Mapping[str, Any], tokens: list[str]) -> Iterator[tuple[str, str]]:
    for name, ours in _SPECIAL.items():
        token = fields.get(f"tokenizer.ggml.{ours}_token_id")
        if isinstance(token, int) and 0 <= token < len(tokens):
            yield name, tokens[token]


def _kind(fields: Mapping[str, Any]) -> Any:
    return fields.get("tokenizer.ggml.pre")


def _list_of(fields: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    """The items of a field; none if there is no such field. Raises PretrainedError."""
    found = fields.get(f"tokenizer.ggml.{name}")
    if found is not None and not (isinstance(found, list) and {type(n) for n in found} <= {kind}):
        raise PretrainedError(
            f"tokenizer.ggml.{name} is {shown(found)}: it has to be a list of {kind.__name__}"
        )
    return found or []


def _spec(fields: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    model, kind = fields["tokenizer.ggml.model"], _kind(fields)
    if model != "llama" and (model != "gpt2" or kind not in [*_SPLITS]):
        named = shown(model) if model != "gpt2" else f"'gpt2' with {shown(kind)}"
        raise PretrainedError(
            f"the file has a tokenizer of the kind {named}; of GGUF files, supported are 'llama', "
            f"and 'gpt2' with {', '.join(_SPLITS)}: {_REMEDY}"
        )
    types = _list_of(fields, "token_type", int) or [_NORMAL] * len(tokens)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or len(types) != len(tokens):
        raise PretrainedError(f"the file has tokens twice, or without a type: {_REMEDY}")
    special = (_CONTROL, _UNKNOWN) if model == "llama" else (_CONTROL,)
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": token,
                **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
                "special": types[number] in special,
            }
            for number, token in enumerate(tokens)
            if types[number] in (*special, _USER_DEFINED)
        ],
        "post_processor": None,
    }
    if model == "llama":
        return spec | _sentencepiece(fields, vocabulary, types)
    return spec | _byte_level(kind, vocabulary, _list_of(fields, "merges", str))


def _sentencepiece(
    fields: Mapping[str, Any], vocabulary: dict[str, int], types: list[int]
) -> dict[str, Any]:
    for name in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if fields.get(f"tokenizer.ggml.{name}"):
            raise PretrainedError(f"tokenizer.ggml.{name} is set, which is not known: {_REMEDY}")
    given = _list_of(fields, "scores", float)
    if len(given) != len(vocabulary) or any(map(math.isnan, given)):
        raise PretrainedError(f"the file has tokens without a score: {_REMEDY}")
    scores = {
        token: given[number]
        for token, number in vocabulary.items()
        if types[number] == _NORMAL and token
    }
    model = bpe_of(scores, vocabulary)
    check(model, scores)
    return steps(bool(fields.get("tokenizer.ggml.add_space_prefix", True))) | {"model": model}


def _byte_level(kind: str, vocabulary: dict[str, int], written: list[str]) -> dict[str, Any]:
    merges = [merge.split(" ", 1) for merge in written]
    if not all(len(pair) == 2 and vocabulary.keys() >= {*pair, "".join(pair)} for pair in merges):
        raise PretrainedError(f"the file merges what are no tokens: {_REMEDY}")
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    last = {**by_bytes, "use_regex": kind in ("gpt-2", "smollm")}
    return {
        "normalizer": {"type": "NFC"} if kind == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*_SPLITS[kind], last]},
        "decoder": {**by_bytes, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": kind in _WHOLE_WORDS,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
