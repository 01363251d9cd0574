"""Tokenizers of the kinds that models come with, trained on a few lines in a second."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

BYTE_LEVEL, BYTE_FALLBACK, UNIGRAM = "byte-level", "byte-fallback", "unigram"
KINDS = (BYTE_LEVEL, BYTE_FALLBACK, UNIGRAM)
SIZE = 600
TEXTS = (
    "Hello world, naïve café — 你好，世界! 👩‍👩‍👧‍👦 🇩🇪 مرحبا हिन्दी",  # noqa: RUF001
    "\n\n\tdef f(x):\n    return x**2  # «ok»",
    "  two leading spaces, then   three",
    " a",
    "e\u0301 combining",
    "a\x00b\x7f\x80",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<tool>call</tool>",
    "",
)
_SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_LINES = ["the quick brown fox jumps over the lazy dog", "Hello world, hello there", *TEXTS] * 5


@cache
def trained(kind: str) -> Tokenizer:
    """A tokenizer of this kind, with special and added tokens."""
    tokenizer = {BYTE_LEVEL: _byte_level, BYTE_FALLBACK: _byte_fallback, UNIGRAM: _unigram}[kind]()
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("</tool>")])
    return tokenizer


def content_of(kind: str, **changes: Any) -> bytes:
    """The `tokenizer.json` of a trained tokenizer, with parts of it replaced."""
    return json.dumps({**json.loads(trained(kind).to_str()), **changes}).encode()


def bytes_alone() -> bytes:
    """The `tokenizer.json` of a model whose tokens are bytes, as GPT-2 writes them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    ids = {chr(byte): byte for byte in plain} | {chr(256 + n): b for n, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    content: str = tokenizer.to_str()
    return content.encode()


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        _LINES,
        trainers.BpeTrainer(
            vocab_size=SIZE, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return tokenizer


def _byte_fallback() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    # Few characters, so that others fall back to bytes.
    tokenizer.train_from_iterator(
        [line for line in _LINES if line.isascii()],
        trainers.BpeTrainer(
            vocab_size=SIZE, special_tokens=[*_SPECIAL, *_BYTES], show_progress=False
        ),
    )
    spec = json.loads(tokenizer.to_str())
    for token in spec["added_tokens"]:  # byte tokens are plain ones, as in Llama 2
        token["special"] = not token["content"].startswith("<0x")
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["special"]]
    return Tokenizer.from_str(json.dumps(spec))


def _unigram() -> Tokenizer:
    pieces = [
        *((token, 0.0) for token in (*_SPECIAL, *_BYTES)),
        *((f"▁{word}", -3.0) for word in ("the", "a", "quick", "Hello", "world,", "two")),
        *((character, -6.0) for character in "▁abcdefghijklmnopqrstuvwxyzH,.é"),
        ("▁▁", -4.0),
    ]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(_SPECIAL)
    return tokenizer
