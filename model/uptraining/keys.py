"""Pass keys that are told in a long text, and asked for at its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.attention import share_heads
from model.decoder import Decoder
from model.patterns.folded import Folded, Windowed
from model.patterns.full import Full
from model.patterns.pattern import Pattern
from model.uptraining.texts import Encode

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Where in the text keys are told, as shares of it."""
_NAMES = ("Anna", "Boris", "Clara", "David", "Emma")
"""Whose keys they are: one at each depth."""
_DIGITS = 5


@dataclass(frozen=True)
class Keys:
    """Pass keys of texts of `length` tokens that were found again."""

    length: int
    by_depth: tuple[float, ...]
    """Share of the digits that are right, for each of DEPTHS."""
    cases: int

    @property
    def digits_right(self) -> float:
        return sum(self.by_depth) / len(self.by_depth)


@dataclass(frozen=True)
class Question:
    """What is asked at the end of a text, with its answer."""

    tokens: Tensor
    """`[T]`, ending with the key."""
    key: int
    """How many tokens the key has."""
    depth: int
    """Which of DEPTHS it was told at."""


@dataclass(frozen=True)
class KeyText:
    """A text that tells a key at every depth, and a question for each."""

    tokens: Tensor
    """`[T]`, the text without questions."""
    questions: tuple[Question, ...]


def key_texts(hay: Tensor, encode: Encode, seed: int = 0) -> list[KeyText]:
    """A text for each row of `hay[B, T]`, as long as it is with one of the questions."""
    rng = np.random.default_rng(seed)
    return [_key_text(row, encode, rng) for row in hay]


def _key_text(row: Tensor, encode: Encode, rng: np.random.Generator) -> KeyText:
    names = [_NAMES[n] for n in rng.permutation(len(_NAMES))]
    keys = ["".join(map(str, rng.integers(10, size=_DIGITS))) for _ in names]
    told, asked = [], []
    for depth, (name, key) in enumerate(zip(names, keys, strict=True)):
        told.append(_ids(encode, f"\nThe pass key of {name} is {key}.\n"))
        question = _ids(encode, f"\nThe pass key of {name} is ")
        answer = _ids(encode, key)
        asked.append(Question(torch.cat((question, answer)), len(answer), depth))
    around = len(row) - sum(map(len, told)) - max(len(each.tokens) for each in asked)
    ends = [round(depth * around) for depth in DEPTHS] + [around]
    parts = [row[: ends[0]]]
    for number, telling in enumerate(told):
        parts += [telling, row[ends[number] : ends[number + 1]]]
    return KeyText(torch.cat(parts), tuple(asked))


@torch.no_grad()
def keys_found(model: Decoder, texts: Sequence[KeyText]) -> Keys:
    """How many tokens of the keys are the most likely ones, each after those before it."""
    right, total = np.zeros(len(DEPTHS)), np.zeros(len(DEPTHS))
    for text in texts:
        for question, logits in zip(text.questions, answers(model, text), strict=True):
            wanted = question.tokens[-question.key :]
            chosen = logits[-question.key - 1 : -1].argmax(-1)
            right[question.depth] += int((chosen == wanted).sum())
            total[question.depth] += question.key
    longest = max(len(question.tokens) for question in texts[0].questions)
    cases = sum(len(text.questions) for text in texts)
    return Keys(len(texts[0].tokens) + longest, tuple((right / total).tolist()), cases)


@torch.no_grad()
def answers(model: Decoder, text: KeyText) -> list[Tensor]:
    """Logits `[T, vocabulary]` of each question, as if it alone came after the text.

    The text is computed once for all of them.
    """
    length = len(text.tokens)
    asked = [question.tokens for question in text.questions]
    positions = [torch.arange(length), *(length + torch.arange(len(each)) for each in asked)]
    where = torch.cat(positions)[None]
    x = model.embed_at(torch.cat((text.tokens, *asked))[None], where)
    turn = model.rotary.turn_at(where) if model.rotary is not None else None
    sizes = [length, *map(len, asked)]

    def attend(pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        (q, *own_q), (k, *own_k), (v, *own_v) = (y.split(sizes, 2) for y in (q, k, v))
        mixed = [pattern(q, k, v, x[:, :length])]
        for own in zip(own_q, own_k, own_v, strict=True):
            whole = [torch.cat(pair, 2) for pair in zip((q, k, v), own, strict=True)]
            mixed.append(_newest(pattern, length, *whole))
        return torch.cat(mixed, 2)

    for block in model.blocks:
        x = block(x, attend, turn)
    logits: Tensor = model.head(model.norm(x[0, length:]))
    return list(logits.split(sizes[1:]))


def _newest(pattern: Pattern, begin: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the tokens from `begin` on read, `[1, H, T, D]`."""
    if isinstance(pattern, Windowed):
        far = pattern.summaries(q, k, v) if isinstance(pattern, Folded) else (k[:, :, :0],) * 2
        return pattern.read(q, k, v, *far, begin, q.shape[2])
    assert isinstance(pattern, Full)
    columns = torch.arange(q.shape[2])
    before = columns[begin:, None] - columns
    seen = (before >= 0) & (before < (pattern.window or q.shape[2]))
    q, k, v = q[:, :, begin:], share_heads(q, k), share_heads(q, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=1.0)


def _ids(encode: Encode, text: str) -> Tensor:
    return torch.from_numpy(np.array(encode(text), np.int64))
