"""Makes requests from plain Python values."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, TypeAlias, TypeGuard

from concertina.client.errors import InvalidRequest
from concertina.client.events import Cursor
from concertina.client.fields import duration, message
from concertina.client.parameters import (
    ContinueParameters,
    GenerateParameters,
    check_parameters,
    sampling_message,
    stopping_message,
)
from concertina.client.pictures import (
    PNG,
    PillowImage,
    PixelArray,
    check_raw,
    png_of_array,
    png_of_image,
)
from concertina.v1 import generation_service_pb2 as pb
from concertina.v1 import model_service_pb2 as model_pb
from concertina.v1 import session_service_pb2 as session_pb

Messages: TypeAlias = Sequence[Mapping[str, str]]
"""A conversation: the `role` and the `content` of each message."""

PromptLike: TypeAlias = (
    str | bytes | bytearray | memoryview | Sequence[int] | Messages | PillowImage | PixelArray
)
"""Text; a PNG, or three bytes per pixel in raster order; token ids; messages; a Pillow image; a
NumPy array.

An array of one axis is token ids; one of uint8, `[height, width]` or `[height, width, channels]`,
is a picture.
"""

_KEY_BYTES: Final = 16


def generate_request(
    prompt: PromptLike | None, parameters: GenerateParameters, keep: float = 0.0
) -> pb.GenerateRequest:
    """A request to generate. With `keep` (seconds) it has a key, so that it is safe to send twice.

    Raises InvalidRequest, naming the parameter, for a value that the message cannot hold, and
    TypeError for a parameter that there is not.
    """
    check_parameters("generate", parameters)
    return message(
        pb.GenerateRequest,
        model=parameters.get("model"),
        prompt=prompt_message(prompt, parameters.get("label")),
        sampling=sampling_message(parameters),
        stopping=stopping_message(parameters),
        output=message(
            pb.OutputOptions,
            n=parameters.get("n"),
            logprobs=parameters.get("logprobs"),
            prompt_logprobs=parameters.get("prompt_logprobs"),
            stream_interval=parameters.get("stream_interval"),
        ),
        priority=parameters.get("priority"),
        keep=duration(pb.GenerateRequest, "keep", keep) if keep else None,
        idempotency_key=secrets.token_urlsafe(_KEY_BYTES) if keep else None,
    )


def continue_request(
    stream_id: str, prompt: PromptLike | None, parameters: ContinueParameters
) -> session_pb.ContinueRequest:
    """A request to continue a stream.

    Raises InvalidRequest, naming the parameter, for a value that the message cannot hold, and
    TypeError for a parameter that there is not.
    """
    check_parameters("continue_", parameters, ContinueParameters.__optional_keys__)
    sampling, stopping = sampling_message(parameters), stopping_message(parameters)
    return message(
        session_pb.ContinueRequest,
        stream_id=stream_id,
        prompt=prompt_message(prompt, None),
        sampling=sampling if sampling.ListFields() else None,
        stopping=stopping if stopping.ListFields() else None,
    )


def fork_request(stream_id: str, n: int) -> session_pb.ForkRequest:
    """A request for copies. Raises InvalidRequest for a number that the message cannot hold."""
    return message(session_pb.ForkRequest, stream_id=stream_id, n=n)


def resume_request(stream_id: str, received: Iterable[Cursor]) -> pb.ResumeRequest:
    """A request for the rest of a stream. Raises InvalidRequest for a cursor that is none."""
    cursors = [
        message(
            pb.ResumeCursor,
            output=each.output,
            tokens=each.tokens,
            characters=each.characters,
            ended=each.ended,
            prompt_logprobs=each.prompt_logprobs,
        )
        for each in received
    ]
    return message(pb.ResumeRequest, stream_id=stream_id, cursors=cursors)


def score_request(prompt: PromptLike, model: str, label: str | None) -> pb.ScoreRequest:
    """A request for a score. Raises InvalidRequest for a prompt that the message cannot hold."""
    return message(pb.ScoreRequest, model=model, prompt=prompt_message(prompt, label))


def tokenize_request(prompt: PromptLike, model: str) -> model_pb.TokenizeRequest:
    """A request for tokens. Raises InvalidRequest for a prompt that the message cannot hold."""
    return message(model_pb.TokenizeRequest, model=model, prompt=prompt_message(prompt, None))


def prompt_message(prompt: PromptLike | None, label: str | None) -> pb.Prompt | None:
    """The message for a prompt; None for no prompt and no label: an unconditional start."""
    if prompt is None:
        return None if label is None else message(pb.Prompt, label=label)
    if isinstance(prompt, str):
        return message(pb.Prompt, text=prompt, label=label)
    if isinstance(prompt, bytes | bytearray) or _is_bytes(prompt):
        prompt = bytes(prompt)
        if prompt.startswith(PNG):
            return message(pb.Prompt, image=pb.ImageRows(png=prompt), label=label)
        check_raw(prompt)
        return message(pb.Prompt, image=pb.ImageRows(rgb=prompt), label=label)
    if len(getattr(prompt, "shape", ())) > 1:
        rows = pb.ImageRows(png=png_of_array(prompt))  # type: ignore[arg-type]  # an array, by its shape
        return message(pb.Prompt, image=rows, label=label)
    if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        messages = [message(pb.Message, **each) for each in prompt]  # type: ignore[arg-type]
        return message(pb.Prompt, messages=pb.Messages(messages=messages), label=label)
    if isinstance(prompt, Iterable):
        return message(pb.Prompt, tokens=message(pb.TokenIds, ids=prompt), label=label)
    if isinstance(prompt, PillowImage):
        return message(pb.Prompt, image=pb.ImageRows(png=png_of_image(prompt)), label=label)
    raise InvalidRequest(
        f"a prompt is text, token ids, PNG or RGB bytes, a Pillow image or a NumPy array; "
        f"got {type(prompt).__name__}",
        field="prompt",
    )


def _is_bytes(prompt: object) -> TypeGuard[memoryview]:
    return isinstance(prompt, memoryview) and prompt.ndim == 1 and prompt.itemsize == 1
