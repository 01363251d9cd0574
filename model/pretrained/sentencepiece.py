"""The BPE of SentencePiece, as the library `tokenizers` merges it.

SentencePiece has no list of merges: it joins the two neighbours whose whole has the best score, the
leftmost of equals. Which merges there are follows from the tokens, and their order from the scores.
Where scores are equal, ranks of merges cannot always say `leftmost`; so the result is compared with
the rule itself on texts made of the vocabulary, and refused if it differs anywhere.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from heapq import heappop, heappush
from typing import Any, Final

from tokenizers import Tokenizer

from model.pretrained.source import PretrainedError

_SPACE: Final = "\u2581"
_LONGEST: Final = 512
_MOST_CHARACTERS: Final = 1 << 23
_TEXTS, _PIECES = 300, 30
_BYTES: Final = tuple(f"<0x{byte:02X}>" for byte in range(256))


def bpe_of(scores: Mapping[str, float], vocabulary: Mapping[str, int]) -> dict[str, Any]:
    """The model in a `tokenizer.json`.

    scores: of the tokens that merges make and begin with; the others of the vocabulary are found by
    other means. Raises PretrainedError.
    """
    if missing := [token for token in _BYTES if token not in vocabulary]:
        raise PretrainedError(f"the vocabulary has no token {missing[0]}: some bytes have none")
    longest, together = max(map(len, scores), default=0), sum(map(len, scores))
    if longest > _LONGEST or together > _MOST_CHARACTERS:
        raise PretrainedError(
            f"the vocabulary has {together:,} characters and {longest:,} in a token; the limits "
            f"are {_MOST_CHARACTERS:,} and {_LONGEST}"
        )
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": dict(vocabulary),
        "merges": _merges(scores),
    }


def steps(prefixed: bool) -> dict[str, Any]:
    """What is done to a text before merging, and to tokens that become text.

    prefixed: whether a text begins with a space, as if it were in the middle of another.
    """
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    unmark = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    before: list[dict[str, Any]] = [{"type": "Prepend", "prepend": _SPACE}] if prefixed else []
    after: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefixed:
        after.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, mark]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [unmark, *after]},
    }


def check(model: dict[str, Any], scores: Mapping[str, float]) -> None:
    """Raise PretrainedError unless a model that `bpe_of` gave merges as SentencePiece does."""
    ours = Tokenizer.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    for text in _texts([*scores]):
        if ours.encode(text).tokens != [
            token
            for piece in merged(text, scores)
            for token in ([piece] if piece in scores else [_BYTES[b] for b in piece.encode()])
        ]:
            raise PretrainedError(
                "the scores of the vocabulary cannot be put into an order of merges: convert the "
                "model's Hugging Face folder"
            )


def merged(text: str, scores: Mapping[str, float]) -> list[str]:
    """The pieces that SentencePiece's rule makes of a text."""
    pieces = [*text]
    following, before = [*range(1, len(pieces) + 1)], [*range(-1, len(pieces) - 1)]
    waiting: list[tuple[float, int, str, str]] = []

    def offer(left: int) -> None:
        if left >= 0 and (right := following[left]) < len(pieces):
            score = scores.get(pieces[left] + pieces[right])
            if score is not None:
                heappush(waiting, (-score, left, pieces[left], pieces[right]))

    for left in range(len(pieces)):
        offer(left)
    while waiting:
        _, left, one, other = heappop(waiting)
        right = following[left]
        if pieces[left] != one or right == len(pieces) or pieces[right] != other:
            continue  # one of them has been joined with another since
        pieces[left], pieces[right] = one + other, ""
        following[left] = following[right]
        if following[left] < len(pieces):
            before[following[left]] = left
        offer(left)
        offer(before[left])
    return [piece for piece in pieces if piece]


def _merges(scores: Mapping[str, float]) -> list[list[str]]:
    """Best scores first; of equal ones, those with the longest left part."""
    found = [
        (score, at, len(token) - at, token)
        for token, score in scores.items()
        for at in range(1, len(token))
        if token[:at] in scores and token[at:] in scores
    ]
    found.sort(reverse=True)
    return [[token[:at], token[at:]] for _, at, _, token in found]


def _texts(tokens: Sequence[str]) -> Iterable[str]:
    """Pieces of the vocabulary in any order, a few of them over and over, and runs of spaces."""
    rng = random.Random(0)
    for number in range(_TEXTS if tokens else 0):
        pieces = rng.choices(tokens if number % 2 else rng.choices(tokens, k=3), k=_PIECES)
        if number % 3 == 0:
            pieces.insert(rng.randrange(_PIECES), _SPACE * rng.randrange(1, 40))
        yield "".join(pieces)
