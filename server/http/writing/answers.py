"""Turns what comes of a request into OpenAI's objects: one answer, or a chunk for each part."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Final

from concertina.client import AsyncClient
from server.http.errors import invalid
from server.http.runs import Began, Cursors, Ended, Piece, Update
from server.http.upstream import Upstream
from server.http.writing.vocabulary import Entry, Vocabulary, chat_logprobs, legacy_logprobs


@dataclass(frozen=True)
class Form:
    """One of the two forms of an answer.

    prefix: what its id begins with. whole, part: its `object`, in one answer and in chunks.
    """

    is_chat: bool
    prefix: str
    whole: str
    part: str


CHAT: Final = Form(True, "chatcmpl-", "chat.completion", "chat.completion.chunk")
LEGACY: Final = Form(False, "cmpl-", "text_completion", "text_completion")


@dataclass(eq=False)
class _Choice:
    texts: list[str] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    ended: Ended | None = None
    offset: int = 0


@dataclass(eq=False)
class Answer:
    """An answer as it grows.

    logprobs: most likely tokens to report; None reports none. stream_ids: of its streams so far.
    """

    form: Form
    upstream: Upstream
    client: AsyncClient
    logprobs: int | None
    stream_ids: list[str] = field(default_factory=list)
    _head: dict[str, Any] = field(default_factory=dict)
    _vocabulary: Vocabulary | None = None
    _choices: dict[int, _Choice] = field(default_factory=lambda: defaultdict(_Choice))
    _prompt_tokens: int = 0

    async def begin(self, began: Began) -> None:
        """A stream of this answer has begun. Raises HttpError if its model writes no text."""
        accepted = began.accepted
        self.stream_ids.append(accepted.stream_id)
        self._prompt_tokens += accepted.prompt_tokens
        if self._head:
            return
        model = await self.upstream.model(self.client, accepted.model)
        if model.modality != "text":
            raise invalid(
                "model",
                f"{model.name} makes a {model.modality}, not text: use /v1/images/generations",
            )
        if self.logprobs is not None:
            self._vocabulary = await self.upstream.vocabulary(
                self.client, accepted.model, accepted.fingerprint
            )
        self._head = {
            "id": f"{self.form.prefix}{accepted.stream_id}",
            "created": int(time.time()),
            "model": accepted.model,
            "system_fingerprint": f"fp_{accepted.fingerprint[:16]}",
        }

    def usage(self) -> dict[str, int]:
        """Counts of tokens."""
        generated = sum(each.ended.tokens for each in self._choices.values() if each.ended)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self._prompt_tokens + generated,
        }

    def take(self, update: Piece | Ended) -> None:
        """Keep a part, for `whole`."""
        choice = self._choices[update.index]
        if isinstance(update, Ended):
            choice.ended = update
        else:
            choice.texts.append(update.text)
            choice.entries += update.entries

    def whole(self) -> dict[str, Any]:
        """The answer, once all has come."""
        choices = [self._whole(index, each) for index, each in sorted(self._choices.items())]
        return {
            **self._head,
            "object": self.form.whole,
            "choices": choices,
            "usage": self.usage(),
        }

    def _whole(self, index: int, choice: _Choice) -> dict[str, Any]:
        assert choice.ended is not None
        text = "".join(choice.texts)
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            "index": index,
            **({"message": message} if self.form.is_chat else {"text": text}),
            "logprobs": self._logprobs(choice, choice.entries),
            "finish_reason": choice.ended.reason,
            "stop_reason": choice.ended.stop,
        }

    def _logprobs(self, choice: _Choice, entries: list[Entry]) -> dict[str, Any] | None:
        if self._vocabulary is None or self.logprobs is None:
            return None
        if self.form.is_chat:
            return chat_logprobs(self._vocabulary, entries, self.logprobs)
        made, choice.offset = legacy_logprobs(
            self._vocabulary, entries, self.logprobs, choice.offset
        )
        return made

    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk of a choice of a chat."""
        return self.chunk(index, {"delta": {"role": "assistant", "content": ""}, "logprobs": None})

    def part(self, piece: Piece) -> dict[str, Any] | None:
        """The chunk of a part; None if there is nothing to say yet."""
        if not piece.text and (self._vocabulary is None or not piece.entries):
            return None
        logprobs = self._logprobs(self._choices[piece.index], list(piece.entries))
        said = {"delta": {"content": piece.text}} if self.form.is_chat else {"text": piece.text}
        return self.chunk(piece.index, {**said, "logprobs": logprobs})

    def closing(self, ended: Ended) -> dict[str, Any]:
        """The last chunk of a choice."""
        self._choices[ended.index].ended = ended
        said: dict[str, Any] = {"delta": {}} if self.form.is_chat else {"text": ""}
        rest = {"logprobs": None, "finish_reason": ended.reason, "stop_reason": ended.stop}
        return self.chunk(ended.index, said | rest)

    def chunk(self, index: int, choice: dict[str, Any]) -> dict[str, Any]:
        """A chunk with one choice."""
        chosen = {"index": index, "finish_reason": None, **choice}
        return {**self._head, "object": self.form.part, "choices": [chosen]}

    def last(self) -> dict[str, Any]:
        """The chunk after all choices, with the usage."""
        return {
            **self._head,
            "object": self.form.part,
            "choices": [],
            "usage": self.usage(),
        }


async def whole_answer(answer: Answer, updates: AsyncIterator[Update]) -> dict[str, Any]:
    """The answer in one object."""
    async for update in updates:
        if isinstance(update, Began):
            await answer.begin(update)
        else:
            answer.take(update)
    return answer.whole()


async def chunks(
    answer: Answer,
    updates: AsyncIterator[Update],
    include_usage: bool,
    cursors: Cursors | None = None,
) -> AsyncGenerator[bytes]:
    """The answer as server-sent events; the first is empty, and comes as soon as it is accepted.

    cursors: the events have ids, which say how far a reader has come.
    """
    async for update in updates:
        if cursors is not None:
            cursors.take(update)
        match update:
            case Began():
                await answer.begin(update)
                yield b""
                if not answer.form.is_chat:
                    continue
                for output in range(update.accepted.output.n):
                    if cursors is None or not cursors.has_begun(output):
                        yield event(answer.opening(update.index + output), include_usage, cursors)
            case Piece():
                made = answer.part(update)
                if made is not None:
                    yield event(made, include_usage, cursors)
            case Ended():
                yield event(answer.closing(update), include_usage, cursors)
    if include_usage:
        yield event(answer.last(), False, cursors)
    yield b"data: [DONE]\n\n"


def event(body: dict[str, Any], with_usage: bool, cursors: Cursors | None = None) -> bytes:
    """An event. with_usage: it has a `usage`, too, which is not known yet."""
    told = body | {"usage": None} if with_usage else body
    data = json.dumps(told, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    line = "" if cursors is None else f"id: {cursors}\n"
    return f"{line}data: {data}\n\n".encode()
