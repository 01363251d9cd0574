"""Reads `tokenizer.json` with suspicion: what is large, unknown or explosive is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

TOKENIZER: Final = "tokenizer.json"
"""The file of a bundle that says what its tokens are, if they are neither bytes nor pixels."""

MOST_BYTES: Final = 48 << 20
"""Size of the largest file that is read; that of Gemma 3, with 262,144 tokens, has 32 MiB."""

LONGEST_TOKEN: Final = 512
"""Characters of the longest token; those of models have up to 128, as runs of spaces have."""

_MOST_ITEMS: Final = 4_000_000  # three for each merge and one for each token: a million of each
_MOST_STEPS: Final = 32
_LONGEST_PATTERN: Final = 4096
_MOST_GROWTH: Final = 64
_MODELS: Final = ("BPE", "Unigram")
_NORMALIZERS: Final = (
    *("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "Strip", "StripAccents", "Precompiled"),
    *("Replace", "Prepend", "ByteLevel"),
)
_PRE_TOKENIZERS: Final = (
    *("ByteLevel", "Metaspace", "Split", "Digits", "Punctuation", "Whitespace"),
    *("WhitespaceSplit", "UnicodeScripts"),
)


class TokenizerError(Exception):
    """A file that is no tokenizer, or not one that is supported. The message says what is wrong."""


def require_size(size: int) -> None:
    """Raise TokenizerError for a file of too many bytes."""
    if size > MOST_BYTES:
        raise TokenizerError(f"has {size:,} bytes, the limit is {MOST_BYTES:,}")


def read_spec(content: bytes) -> dict[str, Any]:
    """What a `tokenizer.json` says. Raises TokenizerError."""
    require_size(len(content))
    if (items := sum(map(content.count, (b",", b"[", b"{")))) > _MOST_ITEMS:
        raise TokenizerError(f"has about {items:,} items, the limit is {_MOST_ITEMS:,}")
    try:
        spec = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"is not JSON: {str(error)[:100]}") from None
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise TokenizerError("is no tokenizer: it has no model")
    _check_type("model", spec["model"], _MODELS)
    for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if spec["model"].get(option):
            raise TokenizerError(f"has a model with {option}, which is not supported")
    _check_normalizer(spec.get("normalizer"))
    for step in steps_of(spec.get("pre_tokenizer"), "pretokenizers"):
        _check_type("pre_tokenizer", step, _PRE_TOKENIZERS)
        _check_pattern("pre_tokenizer", step.get("pattern"))
    return spec


def steps_of(node: Any, name: str) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, one or a sequence, in order.

    name: of the list in a sequence. Raises TokenizerError.
    """
    count, waiting = 0, [node] if node is not None else []
    while waiting:
        step = waiting.pop(0)
        count += 1
        if not isinstance(step, dict) or count > _MOST_STEPS:
            raise TokenizerError(f"has {name} that are no list of at most {_MOST_STEPS} steps")
        if step.get("type") != "Sequence":
            yield step
        elif isinstance(step.get(name), list) and len(step[name]) <= _MOST_STEPS:
            waiting[:0] = step[name]
        else:
            raise TokenizerError(f"has {name} that are no list of at most {_MOST_STEPS} steps")


def _check_type(where: str, step: dict[str, Any], known: tuple[str, ...]) -> None:
    kind = step.get("type")
    if kind is None and where == "model" and isinstance(step.get("merges"), list):
        return  # files of old versions do not name it
    if kind not in known:
        names = ", ".join(known)
        raise TokenizerError(
            f"has a {where} of type {str(kind)[:40]!r}; these are supported: {names}"
        )


def _check_normalizer(node: Any) -> None:
    """Refuse what may make a text very much longer, or take for ever."""
    growth = 1
    for step in steps_of(node, "normalizers"):
        _check_type("normalizer", step, _NORMALIZERS)
        _check_pattern("normalizer", step.get("pattern"))
        growth *= max(1, len(str(step.get("content") or "")))
        if max(growth, len(str(step.get("prepend") or ""))) > _MOST_GROWTH:
            raise TokenizerError(
                f"has a normalizer that makes a text more than {_MOST_GROWTH} times as long"
            )


def _check_pattern(where: str, pattern: Any) -> None:
    """Refuse a regular expression that repeats a group: it may take exponential time."""
    if pattern is None:
        return
    text = pattern.get("Regex", pattern.get("String")) if isinstance(pattern, dict) else None
    if not isinstance(text, str) or not 0 < len(text) <= _LONGEST_PATTERN:
        raise TokenizerError(
            f"has a {where} whose pattern has not 1 to {_LONGEST_PATTERN} characters"
        )
    if "Regex" in pattern and _repeats_a_group(text):
        raise TokenizerError(
            f"has a {where} that repeats a group in {text[:60]!r}, which may take for ever"
        )


def _repeats_a_group(pattern: str) -> bool:
    """Whether `*`, `+` or `{` follows a `)` that ends a group."""
    depth, at, after_group = 0, 0, False  # depth: of character classes, which nest in Oniguruma
    while at < len(pattern):
        character = pattern[at]
        if after_group and character in "*+{":
            return True
        after_group = character == ")" and not depth
        if character == "\\":
            at += 1
        elif character == "[":
            depth += 1
        elif character == "]" and depth:
            depth -= 1
        at += 1
    return False
