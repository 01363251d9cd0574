"""The vocabulary in a GGUF file, as a `tokenizer.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from concertina.codecs.chat_template import TEMPLATE
from concertina.codecs.tokenizer_file import TOKENIZER
from model.pretrained.source import PretrainedError, Vocabulary

_CONTROL, _USER_DEFINED = 3, 4
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
_SPLITS: Final[dict[str, tuple[dict[str, Any], ...]]] = {
    "gpt-2": (),
    "smollm": ({"type": "Digits", "individual_digits": True},),
    "llama-bpe": (
        {
            "type": "Split",
            "pattern": {"Regex": _CASES + _WORDS % "{1,3}"},
            "behavior": "Isolated",
            "invert": False,
        },
    ),
    "qwen2": (
        {
            "type": "Split",
            "pattern": {"Regex": _CASES + _WORDS % ""},
            "behavior": "Isolated",
            "invert": False,
        },
    ),
}
"""What cuts a text before its bytes are merged, by llama.cpp's name for it."""
_REMEDY: Final = "convert the model's Hugging Face folder"


def vocabulary_of(fields: Mapping[str, Any]) -> Vocabulary:
    """What the fields of a GGUF file say. Raises PretrainedError.

    Only byte-level BPE has all that it needs in the file; nothing is guessed of others.
    """
    tokens = fields.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or "tokenizer.ggml.model" not in fields:
        return Vocabulary()
    named = dict(_named(fields, tokens))
    files = {TOKENIZER: json.dumps(_spec(fields, tokens), ensure_ascii=False).encode()}
    template = fields.get("tokenizer.chat_template")
    if isinstance(template, str):
        files[TEMPLATE] = template.encode()
    adds = fields.get("tokenizer.ggml.add_bos_token", _kind(fields) == "llama-bpe")
    begin = fields.get("tokenizer.ggml.bos_token_id") if adds else None
    return Vocabulary(files, named, begin)


def _named(fields: Mapping[str, Any], tokens: list[str]) -> Iterator[tuple[str, str]]:
    for name, ours in _SPECIAL.items():
        token = fields.get(f"tokenizer.ggml.{ours}_token_id")
        if isinstance(token, int) and 0 <= token < len(tokens):
            yield name, tokens[token]


def _kind(fields: Mapping[str, Any]) -> str:
    return str(fields.get("tokenizer.ggml.pre", "gpt-2"))


def _spec(fields: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    model, kind = fields["tokenizer.ggml.model"], _kind(fields)
    if model != "gpt2" or kind not in _SPLITS:
        named = model if model != "gpt2" else f"{model} with {kind}"
        raise PretrainedError(
            f"the file has a tokenizer of the kind {named}; of GGUF files, supported are gpt2 with "
            f"{', '.join(_SPLITS)}: {_REMEDY}"
        )
    merges = [merge.split(" ", 1) for merge in fields.get("tokenizer.ggml.merges") or ()]
    types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or len(types) != len(tokens):
        raise PretrainedError(f"the file has tokens twice, or without a type: {_REMEDY}")
    if not all(len(pair) == 2 and vocabulary.keys() >= {*pair, "".join(pair)} for pair in merges):
        raise PretrainedError(f"the file merges what are no tokens: {_REMEDY}")
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": token,
                **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
                "special": types[number] == _CONTROL,
            }
            for number, token in enumerate(tokens)
            if types[number] in (_CONTROL, _USER_DEFINED)
        ],
        "normalizer": {"type": "NFC"} if kind == "qwen2" else None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                *_SPLITS[kind],
                {**by_bytes, "use_regex": kind in ("gpt-2", "smollm")},
            ],
        },
        "post_processor": None,
        "decoder": {**by_bytes, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": kind == "llama-bpe",
            "vocab": vocabulary,
            "merges": merges,
        },
    }
