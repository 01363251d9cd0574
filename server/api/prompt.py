"""Turns a prompt (text, token ids, messages, or the first rows of an image) into tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import numpy as np

from concertina.codecs.chat_template import ChatTemplateError
from concertina.codecs.prompt_error import PromptError
from concertina.v1 import generation_service_pb2 as pb
from server.arrays import Ints
from server.bundles.bundle import Bundle
from server.errors import InvalidRequest
from server.request import Prompt, prompt_of

_AT_ONCE: Final = 16 * 1024


def prompt_tokens(bundle: Bundle, prompt: pb.Prompt, *, room: int) -> Prompt:
    """The tokens of a prompt, and the start token of its label.

    room: number of tokens that must be left to generate. Raises InvalidRequest with field, value
    and limit.
    """
    ids = prompt_ids(bundle, prompt, room)
    _require_room(bundle, len(ids), room)
    label = prompt.label if prompt.HasField("label") else None
    with _naming_the_field():
        start, ids = bundle.codec.starts.split(ids, label)
    return prompt_of(start, ids, bundle.typecode)


def prompt_ids(bundle: Bundle, prompt: pb.Prompt, room: int | None = None) -> Ints:
    """The ids of a prompt's content. Raises InvalidRequest with field, value and limit.

    room: see `prompt_tokens`; without it there may be more than the context has room for.
    """
    with _naming_the_field():
        return _ids(bundle, prompt, room)


@contextmanager
def _naming_the_field() -> Iterator[None]:
    """Turn a PromptError into an InvalidRequest that names the field."""
    try:
        yield
    except PromptError as error:
        field = f"prompt.{error.field}" if error.field else "prompt"
        raise InvalidRequest(f"{field} {error}", field=field) from None


def empty_prompt(bundle: Bundle) -> Prompt:
    """The prompt of a stream that starts from nothing. Raises InvalidRequest if none can."""
    with _naming_the_field():
        start, ids = bundle.codec.starts.split(np.zeros(0, np.int64), None)
    return prompt_of(start, ids, bundle.typecode)


def scored_tokens(bundle: Bundle, prompt: pb.Prompt) -> Prompt:
    """The tokens of a prompt to score. Raises InvalidRequest with field, value and limit."""
    if prompt.WhichOneof("content") is None:
        raise InvalidRequest(
            "prompt is empty: give the text, tokens or image to score", field="prompt"
        )
    tokens = prompt_tokens(bundle, prompt, room=0)
    if not len(tokens):
        raise InvalidRequest(
            f"prompt has only the token that {bundle.name} predicts others from: "
            "give at least 2 tokens to score",
            field="prompt",
        )
    return tokens


def _require_room(bundle: Bundle, tokens: int, room: int | None) -> None:
    if room is None:
        return
    limit = bundle.context - room
    if tokens > limit:
        kept = f" and {room} of them must be left to generate" if room else ""
        raise InvalidRequest(
            f"prompt has {tokens} tokens, the limit is {limit}: "
            f"{bundle.name} has a context of {bundle.context} tokens{kept}",
            field="prompt",
            limit=limit,
        )


def _ids(bundle: Bundle, prompt: pb.Prompt, room: int | None) -> Ints:
    """The ids of a prompt's content; none if it is only a label."""
    content = prompt.WhichOneof("content")
    if content == "text":
        return _from_text(bundle, prompt.text, room)
    if content == "tokens":
        return _from_ids(bundle, prompt.tokens.ids, room)
    if content == "image":
        return _from_image(bundle, prompt.image)
    if content == "messages":
        return _from_text(bundle, _rendered(bundle, prompt.messages), room)
    if prompt.HasField("label"):
        return np.zeros(0, np.int64)
    raise InvalidRequest(
        "prompt is empty: give a label, text, tokens or an image, or leave prompt out "
        "to start from nothing",
        field="prompt",
    )


def _rendered(bundle: Bundle, messages: pb.Messages) -> str:
    """The text of messages by the bundle's chat template."""
    field = "prompt.messages"
    if not bundle.codec.writes_text:
        raise InvalidRequest(
            f"{field} was given, but {bundle.name} makes {bundle.codec.makes}", field=field
        )
    if bundle.chat_template is None:
        raise InvalidRequest(
            f"{field} was given, but {bundle.name} has no chat template: give text, or have it "
            "served with --chat-template FILE",
            field=field,
        )
    if not messages.messages:
        raise InvalidRequest(f"{field} is empty: give at least 1 message", field=field)
    told = [{"role": each.role, "content": each.content} for each in messages.messages]
    try:
        return bundle.chat_template.render(told)
    except ChatTemplateError as error:
        raise InvalidRequest(f"{field} cannot be a prompt: {error}", field=field) from None


def _from_text(bundle: Bundle, text: str, room: int | None) -> Ints:
    if not text and bundle.codec.writes_text:
        raise InvalidRequest(
            "prompt.text is empty: it must hold at least 1 character; "
            "leave prompt out to start from nothing",
            field="prompt.text",
        )
    if bundle.codec.is_bytewise:
        _require_room(bundle, len(text.encode()), room)  # before anything is computed from them
    return bundle.codec.from_text(text)


def _from_ids(bundle: Bundle, ids: Sequence[int], room: int | None) -> Ints:
    if not len(ids):
        raise InvalidRequest(
            "prompt.tokens.ids is empty: it must hold at least 1 id; "
            "leave prompt out to start from nothing",
            field="prompt.tokens.ids",
        )
    _require_room(bundle, len(ids), room)
    return checked_ids(bundle, "prompt.tokens.ids", ids)


def checked_ids(bundle: Bundle, field: str, ids: Sequence[int]) -> Ints:
    """The ids, all below the vocabulary. Raises InvalidRequest for the first that is not."""
    tokens = np.empty(len(ids), np.int64)
    for at in range(0, len(ids), _AT_ONCE):  # other threads have their turn in between
        tokens[at : at + _AT_ONCE] = ids[at : at + _AT_ONCE]
    vocabulary = bundle.vocabulary
    wrong = np.flatnonzero(tokens >= vocabulary)
    if len(wrong):
        raise InvalidRequest(
            f"{field}[{wrong[0]}] is {tokens[wrong[0]]}; "
            f"ids of {bundle.name} must be below {vocabulary}",
            field=f"{field}[{wrong[0]}]",
            limit=vocabulary - 1,
        )
    return tokens


def _from_image(bundle: Bundle, image: pb.ImageRows) -> Ints:
    form = image.WhichOneof("rows")
    if form is None and not bundle.codec.writes_text:
        raise InvalidRequest("prompt.image is empty: give png or rgb", field="prompt.image")
    if form == "png":
        return bundle.codec.from_png(image.png)
    return bundle.codec.from_rgb(image.rgb)
