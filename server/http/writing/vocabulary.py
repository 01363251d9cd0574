"""Names of tokens, as the log-probabilities of OpenAI's API have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from concertina.client import AsyncClient, TokenLogprobs

_AT_ONCE: Final = 16 * 1024
_CALL_SECONDS: Final = 60.0

START_NAME: Final = "<|start|>"
"""Stands for the hidden start token of a model without a tokenizer, whose id is its vocabulary."""


@dataclass(frozen=True)
class Vocabulary:
    """Bytes of text of every token; empty for one that is no text."""

    pieces: tuple[bytes, ...]

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token."""
        return self.pieces[token] if token < len(self.pieces) else b""

    def name(self, token: int) -> str:
        """The text of a token; `bytes:\\xNN` if it is a part of a character, its id if none."""
        if token == len(self.pieces):
            return START_NAME
        piece = self.bytes_of(token)
        if not piece:
            return f"token_id:{token}"
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


async def vocabulary_of(client: AsyncClient, model: str, size: int) -> Vocabulary:
    """The tokens of a model with this many."""
    pieces: list[bytes] = []
    for at in range(0, size, _AT_ONCE):
        ids = range(at, min(size, at + _AT_ONCE))
        part = await client.detokenize(ids, model=model, timeout=_CALL_SECONDS)
        pieces += part.pieces
    return Vocabulary(tuple(pieces))


Entry = tuple[int, TokenLogprobs | None]
"""A token and its log-probabilities; None for a token that nothing predicts."""


def legacy_logprobs(
    vocabulary: Vocabulary, entries: Sequence[Entry], most: int, offset: int
) -> tuple[dict[str, Any], int]:
    """`logprobs` of /v1/completions, and the offset of the next token in the text."""
    names = [vocabulary.name(token) for token, _ in entries]
    offsets = []
    for name in names:
        offsets.append(offset)
        offset += len(name)
    made = {
        "tokens": names,
        "token_logprobs": [told and told.logprob for _, told in entries],
        "top_logprobs": [_legacy_top(vocabulary, *entry, most) for entry in entries],
        "text_offset": offsets,
    }
    return made, offset


def _legacy_top(
    vocabulary: Vocabulary, token: int, told: TokenLogprobs | None, most: int
) -> dict[str, float] | None:
    """The most likely tokens by their names, with the token itself. No name occurs twice."""
    if told is None:
        return None
    ranked = [*zip(told.top_ids[:most], told.top_logprobs[:most], strict=True)]
    if token not in told.top_ids[:most]:
        ranked.append((token, told.logprob))
    made: dict[str, float] = {}
    for each, logprob in ranked:
        name = vocabulary.name(each)
        made[f"token_id:{each}" if name in made else name] = logprob
    return made


def chat_logprobs(vocabulary: Vocabulary, entries: Sequence[Entry], most: int) -> dict[str, Any]:
    """`logprobs` of /v1/chat/completions."""
    content = []
    for token, told in entries:
        if told is None:
            continue
        top = zip(told.top_ids[:most], told.top_logprobs[:most], strict=True)
        content.append(
            _named(vocabulary, token, told.logprob)
            | {"top_logprobs": [_named(vocabulary, *each) for each in top]}
        )
    return {"content": content, "refusal": None}


def _named(vocabulary: Vocabulary, token: int, logprob: float) -> dict[str, Any]:
    piece = vocabulary.bytes_of(token)
    return {"token": vocabulary.name(token), "logprob": logprob, "bytes": list(piece)}
